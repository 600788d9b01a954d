"""Metrics of a data set as functions of named means over rows.

This is the form that the bootstrap resamples: each takes a mapping from a quantity's name to its
means, ``[1 + resamples]``, and returns one value per entry. Quantities are named
``candidate.quantity``; :meth:`~conlens_jax.evaluation.suite.Suite.quantities` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from conlens_jax.measurement import metrics
from conlens_jax.measurement.bootstrap import Statistic
from conlens_jax.measurement.metrics import fraction_removed, fve_nrm_reference

REFERENCES = ("mean", "zero", "other")
Means = Mapping[str, np.ndarray]


def mean_of(name: str) -> Statistic:
    return lambda means: means[name]


def ratio_of(numerator: str, denominator: str) -> Statistic:
    """NaN or infinite where the denominator is 0."""
    return lambda means: ratio(means[numerator], means[denominator])


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator) / np.asarray(denominator)


def fve_nrm_of(cos: str, resultant: float) -> Statistic:
    return lambda means: fve_nrm_at(means[cos], resultant)


def fve_nrm_at(mean_cos: np.ndarray, resultant: float) -> np.ndarray:
    """``fve_nrm`` of a mean cosine, elementwise."""
    return fraction_removed(metrics.mse_nrm(mean_cos), fve_nrm_reference(resultant))


def difference_of(first: Statistic, second: Statistic) -> Statistic:
    """Taken inside each resample, and so paired."""

    def statistic(means: Means) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.asarray(first(means)) - np.asarray(second(means))

    return statistic


def doublings(most: int) -> list[int]:
    """1, 2, 4, … and ``most``: the k of ``fve_nrm_at_k`` (up to T), the K of best of K."""
    return [2**power for power in range(most.bit_length()) if 2**power < most] + [most]


def reconstruction_statistics(
    candidate: str, prefix: str, resultant: float, only: Sequence[str] = ()
) -> dict[str, Statistic]:
    """Every metric of one candidate vector (or ``only`` some), named with the prefix."""
    of = lambda quantity: f"{candidate}.{quantity}"
    statistics: dict[str, Statistic] = {
        "cos": mean_of(of("cos")),
        "fve_nrm": fve_nrm_of(of("cos"), resultant),
        "fve_raw": lambda means: fraction_removed(means[of("error")], means["spread"]),
        "kl_at": mean_of(of("kl_at")),
        "kl_cont": mean_of(of("kl_cont")),
        "top1_agree": mean_of(of("top1")),
        "ce_rec": lambda means: metrics.cross_entropy_recovered(
            means["mean.ce"], means[of("ce")], means["clean.ce"]
        ),
    }
    for reference in REFERENCES:
        statistics[f"kl_frac_{reference}"] = lambda means, reference=reference: fraction_removed(
            means[of("kl_at")], means[f"{reference}.kl_at"]
        )
    return {prefix + name: statistics[name] for name in only or statistics}


def attribute_statistics(name: str, prefix: str) -> dict[str, Statistic]:
    """How often the text states M's most likely next token, where that is an attribute word."""
    own, other = f"{name}.stated", f"{name}.stated_shuffled"
    return {
        f"{prefix}attribute_stated": ratio_of(own, "attribute"),
        f"{prefix}null_shuffle_attribute_stated": ratio_of(other, "attribute"),
        f"{prefix}attribute_ratio": ratio_of(own, other),
    }
