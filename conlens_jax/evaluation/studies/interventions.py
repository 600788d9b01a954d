"""Interventions: change one word of an explanation, read it again, and see what M then predicts.

Where an explanation states a value v of a variable, v is replaced by another value w of the same
variable. The edited text is read and swapped into M, and the change of log p(w) − log p(v) is
compared with that of two edits of the same size: v replaced by a third value (which also
removes v, but does not state w), and another word of the text replaced by a random one. In
explanations in words v is the first word that M is said to be about to say, so that any text will
do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from conlens_jax.config.seeds import numpy_seed
from conlens_jax.corpora.statements import NOTHING, TokenVariable
from conlens_jax.evaluation.claims import NEXT, ClaimReader
from conlens_jax.evaluation.suite import Evaluated, PerRow, Suite
from conlens_jax.measurement.aggregates import difference_of, mean_of, ratio_of
from conlens_jax.measurement.bootstrap import Interval, Statistic
from conlens_jax.models.param_table import Params
from conlens_jax.models.written import before_end

EDITS = {"edit": "", "third_value": "third_value_", "random_word": "random_word_"}
"""Edits, and the prefix of their metrics."""


@dataclasses.dataclass(frozen=True)
class Edits:
    """One edit of each of N texts and its two controls.

    Attributes:
      variable_N: index of the variable that is edited, −1 where the text states none.
      pairs_N2: token ids of v and w.
      texts: edited texts [N, T], by name of :data:`EDITS`.
    """

    variable_N: np.ndarray
    pairs_N2: np.ndarray
    texts: dict[str, np.ndarray]


def draw_edits(texts_NT: np.ndarray, variables: Mapping[str, TokenVariable], seed: int) -> Edits:
    """Draws for each text which stated value is edited, w and the third value, and the place and
    token (from all texts) of the random word.

    Args:
      variables: how a text states each; those with fewer than three values are not edited:
        there is no third value.
    """
    count, listed = len(texts_NT), list(variables.values())
    stated_ANT = np.stack(
        [
            v.stated(texts_NT) if len(v.values_K) >= 3 else np.full_like(texts_NT, NOTHING)
            for v in listed
        ]
    )
    variable_N, pairs_N2 = np.full(count, -1), np.zeros((count, 2), np.int32)
    edited = {name: texts_NT.copy() for name in EDITS}
    pool = texts_NT.reshape(-1)
    for row, text in enumerate(texts_NT):
        rng = np.random.default_rng((numpy_seed(seed), row))
        places = np.flatnonzero((stated_ANT[:, row] != NOTHING).any(axis=0))
        if not len(places) or len(text) < 2:
            continue
        place = rng.choice(places)
        first = int(text[place])
        # Names and friends share their words: the first variable that fits is taken.
        index = int(np.argmax(stated_ANT[:, row, place] != NOTHING))
        others = np.setdiff1d(listed[index].values_K, text)
        if len(others) < 2:
            continue
        variable_N[row] = index
        second, third = rng.choice(others, 2, replace=False)
        pairs_N2[row] = first, second
        # Everywhere: a text may contain a word twice.
        here_T = stated_ANT[index, row] == first
        edited["edit"][row, here_T] = second
        edited["third_value"][row, here_T] = third
        elsewhere = np.flatnonzero(~here_T)
        if len(elsewhere):
            edited["random_word"][row, rng.choice(elsewhere)] = rng.choice(pool)
    return Edits(variable_N, pairs_N2, edited)


def draw_next_word_edits(
    texts_NT: np.ndarray, reader: ClaimReader, end: int | None, seed: int
) -> Edits:
    """Edits of the first word that each text says M is about to say; w and the third value are such
    words of other texts, neither of which the text says.

    Args:
      reader: finds the words; end: the end token.
    """
    texts = [before_end(text, end) for text in texts_NT]
    said = [[claim for claim in reader.of(text) if claim.kind == NEXT] for text in texts]
    first_words = np.array([claims[0].says for claims in said if claims], np.int32)
    variable_N, pairs_N2 = np.full(len(texts), -1), np.zeros((len(texts), 2), np.int32)
    edited = {name: texts_NT.copy() for name in EDITS}
    pool = np.array([token for text in texts for token in text], np.int32)
    for row, claims in enumerate(said):
        rng = np.random.default_rng((numpy_seed(seed), row))
        others = first_words[~np.isin(first_words, [claim.says for claim in claims])]
        if not claims or len(np.unique(others)) < 2:
            continue
        place = claims[0].places[0]
        second = rng.choice(others)
        third = rng.choice(others[others != second])
        variable_N[row] = 0
        pairs_N2[row] = claims[0].says, second
        edited["edit"][row, place] = second
        edited["third_value"][row, place] = third
        elsewhere = np.setdiff1d(np.arange(len(texts[row])), [place])
        if len(elsewhere):
            edited["random_word"][row, rng.choice(elsewhere)] = rng.choice(pool)
    return Edits(variable_N, pairs_N2, edited)


def intervene(
    suite: Suite,
    evaluated: Evaluated,
    trainable: Params,
    frozen: Params,
    variables: Mapping[str, TokenVariable],
    seed: int,
) -> dict[str, Interval]:
    """Shift and success of the edits of greedy explanations.

    The *shift* is the change of log p(w) − log p(v) in nats, mean over M's predictions at
    P..P+h−1. *Success* is the share of rows where M preferred v at P before the edit and prefers w
    after it. ``next_`` is of the rows where v is M's most likely next token.
    """
    edits = draw_edits(evaluated.explained.texts["greedy"], variables, seed)
    stated_N = edits.variable_N >= 0
    # Where v is M's next token, its next prediction is the one that has to change.
    groups = {
        "": Group(stated_N),
        "next_": Group(stated_N & _is_next(edits, evaluated), first=True),
    }
    groups |= {
        f"{name}_": Group(edits.variable_N == index)
        for index, name in enumerate(variables)
        if np.any(edits.variable_N == index)
    }
    return _effects(suite, evaluated, trainable, frozen, edits, groups, "intervention")


def intervene_on_next_words(
    suite: Suite,
    evaluated: Evaluated,
    trainable: Params,
    frozen: Params,
    reader: ClaimReader,
    seed: int,
) -> dict[str, Interval]:
    """The same for the first next word of explanations in words (:func:`draw_next_word_edits`), by
    M's prediction at P, with ``next_word_intervention`` in the names."""
    texts_NT, end = evaluated.explained.texts["greedy"], suite.measurer.spec.end
    edits = draw_next_word_edits(texts_NT, reader, end, seed)
    stated_N = edits.variable_N >= 0
    groups = {
        "": Group(stated_N, first=True),
        "next_": Group(stated_N & _is_next(edits, evaluated), first=True),
    }
    study = "next_word_intervention"
    return _effects(suite, evaluated, trainable, frozen, edits, groups, study)


def _is_next(edits: Edits, evaluated: Evaluated) -> np.ndarray:
    """Whether v is M's most likely next token; [N]."""
    return evaluated.effects["clean"].top_tokens[:, 0] == edits.pairs_N2[:, 0]


class Group(NamedTuple):
    """Edited rows that are measured together.

    Attributes:
      rows_N: which.
      first: whether M's prediction at P counts, instead of the mean over all predictions.
    """

    rows_N: np.ndarray
    first: bool = False


def _effects(
    suite: Suite,
    evaluated: Evaluated,
    trainable: Params,
    frozen: Params,
    edits: Edits,
    groups: Mapping[str, Group],
    study: str,
) -> dict[str, Interval]:
    """Shift and success of edits in each group of rows; ``study`` is in all names."""
    vectors = {
        name: suite.measurer.read(trainable, frozen, texts) for name, texts in edits.texts.items()
    }
    vectors["before"] = evaluated.explained.reconstructions["greedy"]
    odds = suite.measurer.odds(frozen["original"], suite.rows, vectors, edits.pairs_N2)
    before_Nh = odds.pop("before")
    per_row: PerRow = {}
    statistics: dict[str, Statistic] = {}
    for group, (mask_N, first) in groups.items():
        could_N = mask_N & (before_Nh[:, 0] < 0)
        for name, prefix in EDITS.items():
            seen = slice(0, 1) if first else slice(None)
            shift_N = (odds[name] - before_Nh)[:, seen].mean(axis=1)
            success_N = could_N & (odds[name][:, 0] > 0)
            key = f"{prefix}{study}_{group}"
            per_row |= {f"{key}.shift": np.where(mask_N, shift_N, 0.0), f"{key}.rows": mask_N}
            per_row |= {f"{key}.success": success_N, f"{key}.could": could_N}
            statistics[f"{key}shift"] = ratio_of(f"{key}.shift", f"{key}.rows")
            statistics[f"{key}success"] = ratio_of(f"{key}.success", f"{key}.could")
    for name, prefix in list(EDITS.items())[1:]:
        for group in ("", "next_"):
            for what in ("shift", "success"):
                statistics[f"{study}_{group}{what}_minus_{name}"] = difference_of(
                    statistics[f"{study}_{group}{what}"],
                    statistics[f"{prefix}{study}_{group}{what}"],
                )
    statistics[f"{study}_rows"] = mean_of(f"{study}_.rows")
    return suite.intervals(statistics, per_row)
