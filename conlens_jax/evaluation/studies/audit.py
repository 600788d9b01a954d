"""The private-code audit: would any other reader understand the lens's text?

Two readers, the lens's own encoder and one that has never seen a text of any decoder
(:mod:`conlens_jax.training.auditor`), read the explanations whole, cut short, and damaged. What
words say survives another reader and small damage; a private code does not.

``gap_frozen`` is own minus audit FVE on the same texts. Both readers also read true windows of the
corpus: ``gap_frozen_window`` is the gap where there can be no code.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from conlens_jax.evaluation.studies.text_changes import CHANGES, Lexicon, Texts, changed, is_changed
from conlens_jax.evaluation.suite import Evaluated, PerRow, Suite
from conlens_jax.measurement.aggregates import (
    Means,
    difference_of,
    doublings,
    fve_nrm_at,
    fve_nrm_of,
    mean_of,
    ratio,
    reconstruction_statistics,
)
from conlens_jax.measurement.bootstrap import Interval, Statistic
from conlens_jax.measurement.metrics import fraction_removed
from conlens_jax.models.param_table import Params

SHORT = ("fve_nrm", "kl_frac_mean", "top1_agree")


def audit_lens(
    suite: Suite,
    evaluated: Evaluated,
    trainable: Params,
    frozen: Params,
    auditor: Params,
    lexicon: Lexicon,
    seed: int,
) -> dict[str, Interval]:
    """All audit metrics of one lens.

    Args:
      evaluated: the lens in the basic suite, on the same rows.
      auditor: ``{"encoder": …}`` of :func:`~conlens_jax.training.auditor.train_auditor`.
      seed: of the changes to the texts.
    """
    resultant = suite.reference.resultant
    explained, greedy = evaluated.explained, evaluated.explained.texts["greedy"]
    text_len = greedy.shape[1]
    lengths = doublings(text_len)
    damaged = {name: changed(greedy, name, lexicon, seed) for name in CHANGES}
    touched = {name: is_changed(greedy, texts) for name, texts in damaged.items()}
    damaged = {name: texts for name, texts in damaged.items() if touched[name].any()}
    cut = {f"first_{k}": Texts(greedy, np.full(len(greedy), k, np.int32)) for k in lengths}
    readers = {"": trainable, "frozen_": {**trainable, **auditor}}
    vectors: dict[str, np.ndarray] = {}
    for reader, parts in readers.items():
        read = lambda texts, parts=parts: suite.measurer.read(parts, frozen, *texts)
        for name, texts in {**damaged, **cut}.items():
            vectors[reader + name] = read(texts)
        vectors[f"{reader}whole"] = vectors[f"{reader}first_{text_len}"]
        vectors[f"{reader}whole_sampled"] = read(Texts.whole(explained.texts["sampled"]))
        vectors[f"{reader}null_shuffle"] = vectors[f"{reader}whole"][suite.partner_N]
        vectors[f"{reader}window"] = read(Texts.whole(suite.targets_NT))
    per_row = suite.score(evaluated, frozen["original"], vectors)
    statistics: dict[str, Statistic] = {}
    for candidate, prefix in (
        ("frozen_whole", "frozen_"),
        ("frozen_whole_sampled", "frozen_sampled_"),
        ("frozen_null_shuffle", "frozen_null_shuffle_"),
        ("frozen_window", "frozen_window_"),
    ):
        statistics |= reconstruction_statistics(candidate, prefix, resultant, SHORT)
    for name, text in (("", "whole"), ("sampled_", "whole_sampled"), ("window_", "window")):
        statistics[_gap_name(name)] = difference_of(
            fve_nrm_of(f"{text}.cos", resultant), fve_nrm_of(f"frozen_{text}.cos", resultant)
        )
    for reader in readers:
        for name in damaged:
            mask = touched[name]
            per_row |= _where(mask, f"{reader}{name}", f"{reader}whole", per_row)
            statistics |= reconstruction_statistics(
                f"{reader}{name}", f"{reader}{name}_", resultant, SHORT
            )
            statistics |= _retention(f"{reader}{name}", resultant)
            statistics[f"{name}_rows"] = mean_of(f"{reader}{name}.touched")
        for k in lengths:
            short = reconstruction_statistics(f"{reader}first_{k}", "", resultant, SHORT)
            statistics |= {f"{reader}{metric}_at_{k}": short[metric] for metric in SHORT}
        statistics |= {
            f"{reader}tokens_to_0": _tokens_to(reader, lengths, 0.0, resultant),
            f"{reader}tokens_to_half": _tokens_to(reader, lengths, 0.5, resultant),
        }
    return suite.intervals(statistics, per_row)


def _gap_name(text: str) -> str:
    return "gap_frozen_window" if text == "window_" else f"{text}gap_frozen"


def _where(mask_N: np.ndarray, after: str, before: str, per_row: Mapping) -> PerRow:
    """The quantities of a change on the rows that it touches, 0 on the others."""
    return {
        f"{after}.touched": mask_N,
        f"{after}.touched_mean_kl": mask_N * per_row["mean.kl_at"],
        **{
            f"{after}.touched_{when}_{quantity}": mask_N * per_row[f"{name}.{quantity}"]
            for when, name in (("after", after), ("before", before))
            for quantity in ("cos", "kl_at")
        },
    }


def _retention(name: str, resultant: float) -> dict[str, Statistic]:
    """What is left of FVE and of the KL removed, on the rows that the change touches. NaN where
    there was nothing to lose."""

    def fve(means: Means, when: str) -> np.ndarray:
        cos = ratio(means[f"{name}.touched_{when}_cos"], means[f"{name}.touched"])
        return fve_nrm_at(cos, resultant)

    def removed(means: Means, when: str) -> np.ndarray:
        return fraction_removed(
            means[f"{name}.touched_{when}_kl_at"], means[f"{name}.touched_mean_kl"]
        )

    def retained(of) -> Statistic:
        def statistic(means: Means) -> np.ndarray:
            before = of(means, "before")
            return np.where(before > 0, ratio(of(means, "after"), before), np.nan)

        return statistic

    return {f"{name}_retention": retained(fve), f"{name}_kl_retention": retained(removed)}


def _tokens_to(reader: str, lengths: list[int], share: float, resultant: float) -> Statistic:
    """The fewest tokens (of the measured lengths) whose FVE is at least a share of the whole
    text's; infinite where even the whole text has none."""

    def statistic(means: Means) -> np.ndarray:
        fve_KR = np.stack([fve_nrm_at(means[f"{reader}first_{k}.cos"], resultant) for k in lengths])
        reached_KR = fve_KR >= np.maximum(share * fve_KR[-1], 0.0)
        first_R = np.asarray(lengths, np.float64)[np.argmax(reached_KR, axis=0)]
        return np.where(reached_KR.any(axis=0), first_R, np.inf)

    return statistic
