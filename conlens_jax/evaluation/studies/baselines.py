"""Baselines: other descriptions of the activation, and texts that ignore it.

Vectors: a linear code with the bits of a text. Texts, read by the audit encoder: M's own words
without the vector (``text_only``), an untrained decoder with the activation in the slot of its
prompt (``hard_prompt``), the likeliest tokens of a logit lens and of a tuned one, random words.
Predictions: the two lenses that read M's next token from the activation by a linear map.
"""

from __future__ import annotations

import numpy as np

from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.studies.linear_code import LinearCode, bits_of_text
from conlens_jax.evaluation.studies.probe import linear_map
from conlens_jax.evaluation.suite import Evaluated, PerRow, Suite
from conlens_jax.measurement.aggregates import mean_of, reconstruction_statistics
from conlens_jax.measurement.bootstrap import Interval, Statistic
from conlens_jax.measurement.metrics import fraction_removed, top1_agreement
from conlens_jax.measurement.programs import SwapEffect
from conlens_jax.models.param_table import Params

SHORT = ("fve_nrm", "kl_frac_mean", "top1_agree")
LENSES = ("logit_lens", "tuned_lens")
Predicted = dict[str, tuple[SwapEffect, np.ndarray]]
"""By lens: its prediction at P against M's, and its T likeliest tokens [N, T]."""


def text_only(suite: Suite, original: Params) -> np.ndarray:
    """The target that the warm start teaches, as M would write it without the vector; [N, T]. Of a
    window the true tokens up to P, then M's own likeliest continuation; others are made without the
    vector as they are."""
    if suite.rows.targets_NT.shape[1]:
        return suite.targets_NT
    before, after = suite.warm.before, suite.warm.after
    seen_NT = suite.window(before, 0)
    if not after:
        return seen_NT
    return np.concatenate(
        [seen_NT, suite.measurer.continuations(original, suite.rows, after)], axis=1
    )


def baselines(
    suite: Suite,
    evaluated: Evaluated,
    trainable: Params,
    untrained: Params,
    frozen: Params,
    auditor: Params,
    train: Rows,
    seed: int,
    *,
    in_words: bool = False,
) -> dict[str, Interval]:
    """The metrics of all baselines; only ``untrained_encoder`` depends on the lens.

    Args:
      evaluated, trainable: a measured lens; its rows' references are used, and its greedy text is
        given to an untrained encoder.
      untrained: a lens before any training.
      train: rows to fit the linear maps on.
      seed: of the random words.
      in_words: explanations say what M is about to say. Then also ``…_words_right``: the share of a
        lens's five likeliest tokens (or T) that are among M's five.
    """
    measurer, original, rows = suite.measurer, frozen["original"], suite.rows
    text_len, vocab_size = measurer.spec.text_len, measurer.spec.model.vocab_size
    n_bits = bits_of_text(text_len, vocab_size)
    code = LinearCode.fit(train.activations_ND, n_bits)
    predicted = _predicted(suite, original, train)
    rng = np.random.default_rng(seed)
    in_context = np.arange(train.tokens_NS.shape[1]) < train.lengths_N[:, None]
    corpus_tokens = train.tokens_NS[in_context]
    texts = {
        "text_only": text_only(suite, original),
        "hard_prompt": measurer.explain(untrained, frozen, rows).texts["greedy"],
        "random_words": rng.choice(corpus_tokens, (len(rows), text_len)).astype(np.int32),
        **{f"{name}_words": words_NT for name, (_, words_NT) in predicted.items()},
    }
    audited = {**trainable, **auditor}
    vectors = {name: measurer.read(audited, frozen, text) for name, text in texts.items()}
    vectors["linear_code"] = code(rows.activations_ND)
    greedy = evaluated.explained.texts["greedy"]
    vectors["untrained_encoder"] = measurer.read(untrained, frozen, greedy)
    per_row = suite.score(evaluated, original, vectors)
    statistics: dict[str, Statistic] = {}
    resultant = suite.reference.resultant
    for name in vectors:
        statistics |= reconstruction_statistics(name, f"{name}_", resultant, SHORT)
    of_lenses, statistics_of_lenses = _compared_with_m(evaluated, predicted, in_words)
    return {
        **suite.intervals(statistics | statistics_of_lenses, per_row | of_lenses),
        "linear_code_bits": Interval(code.bits),
        "text_bits": Interval(float(n_bits)),
    }


def linear_lenses(
    suite: Suite, evaluated: Evaluated, original: Params, train: Rows
) -> dict[str, Interval]:
    """What the logit lens and the tuned lens predict from the activation, of :func:`baselines`
    alone, for explanations in words.

    Args:
      evaluated: a measured lens, whose rows' references are used.
      train: rows to fit the tuned lens on.
    """
    predicted = _predicted(suite, original, train)
    per_row, statistics = _compared_with_m(evaluated, predicted, in_words=True)
    return suite.intervals(statistics, {**evaluated.per_row, **per_row})


def _predicted(suite: Suite, original: Params, train: Rows) -> Predicted:
    measurer, rows = suite.measurer, suite.rows
    tuned = linear_map(train.activations_ND, measurer.last_states(original, train))
    states = {"logit_lens": rows.activations_ND, "tuned_lens": tuned(rows.activations_ND)}
    return {name: measurer.unembedded(original, rows, states[name]) for name in LENSES}


def _compared_with_m(
    evaluated: Evaluated, predicted: Predicted, in_words: bool
) -> tuple[PerRow, dict[str, Statistic]]:
    likely_Nk = evaluated.effects["clean"].top_tokens
    clean = likely_Nk[:, 0]
    per_row: PerRow = {}
    statistics: dict[str, Statistic] = {}
    for name, (effect, words_NT) in predicted.items():
        if in_words:
            is_right = words_NT[:, : likely_Nk.shape[1], None] == likely_Nk[:, None]
            per_row[f"{name}.right"] = is_right.any(axis=2).mean(axis=1)
            statistics[f"{name}_words_right"] = mean_of(f"{name}.right")
        per_row[f"{name}.kl_at"] = effect.kl_at
        per_row[f"{name}.top1"] = top1_agreement(effect.top_tokens[:, 0], clean)
        statistics[f"{name}_kl_at"] = mean_of(f"{name}.kl_at")
        statistics[f"{name}_top1_agree"] = mean_of(f"{name}.top1")
        statistics[f"{name}_kl_frac_mean"] = lambda means, name=name: fraction_removed(
            means[f"{name}.kl_at"], means["mean.kl_at"]
        )
    return per_row, statistics
