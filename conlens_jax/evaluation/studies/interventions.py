"""Interventions: change one word of an explanation, read it again, and see what M then predicts.

Where an explanation states a value v of a variable, v is replaced by another value w of the same
variable. The edited text is read and swapped into M, and the change of log p(w) − log p(v) is
compared with that of two edits of the same size: v replaced by a third value (which also
removes v, but does not state w), and another word of the text replaced by a random one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from conlens_jax.config.seeds import numpy_seed
from conlens_jax.corpora.statements import NOTHING, TokenVariable
from conlens_jax.evaluation.suite import Evaluated, PerRow, Suite
from conlens_jax.measurement.aggregates import difference_of, mean_of, ratio_of
from conlens_jax.measurement.bootstrap import Interval, Statistic
from conlens_jax.models.param_table import Params

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
    vectors = {
        name: suite.measurer.read(trainable, frozen, texts) for name, texts in edits.texts.items()
    }
    vectors["before"] = evaluated.explained.reconstructions["greedy"]
    odds = suite.measurer.odds(frozen["original"], suite.rows, vectors, edits.pairs_N2)
    stated_N = edits.variable_N >= 0
    is_next_N = stated_N & (evaluated.effects["clean"].top_tokens[:, 0] == edits.pairs_N2[:, 0])
    before_Nh = odds.pop("before")
    groups = {"": stated_N, "next_": is_next_N}
    groups |= {
        f"{name}_": edits.variable_N == index
        for index, name in enumerate(variables)
        if np.any(edits.variable_N == index)
    }
    per_row: PerRow = {}
    statistics: dict[str, Statistic] = {}
    for group, mask_N in groups.items():
        could_N = mask_N & (before_Nh[:, 0] < 0)
        for name, prefix in EDITS.items():
            # Where v is M's next token, its next prediction is the one that has to change.
            seen = slice(0, 1) if group == "next_" else slice(None)
            shift_N = (odds[name] - before_Nh)[:, seen].mean(axis=1)
            success_N = could_N & (odds[name][:, 0] > 0)
            key = f"{prefix}intervention_{group}"
            per_row |= {f"{key}.shift": np.where(mask_N, shift_N, 0.0), f"{key}.rows": mask_N}
            per_row |= {f"{key}.success": success_N, f"{key}.could": could_N}
            statistics[f"{key}shift"] = ratio_of(f"{key}.shift", f"{key}.rows")
            statistics[f"{key}success"] = ratio_of(f"{key}.success", f"{key}.could")
    for name, prefix in list(EDITS.items())[1:]:
        for group in ("", "next_"):
            for what in ("shift", "success"):
                statistics[f"intervention_{group}{what}_minus_{name}"] = difference_of(
                    statistics[f"intervention_{group}{what}"],
                    statistics[f"{prefix}intervention_{group}{what}"],
                )
    statistics["intervention_rows"] = mean_of("intervention_.rows")
    return suite.intervals(statistics, per_row)
