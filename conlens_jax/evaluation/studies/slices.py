"""The headline metrics on parts of the rows: by position in the context, and by norm.

Activations with an outlying norm dominate means of squared errors, so they are also reported
separately.
"""

from __future__ import annotations

import numpy as np

from conlens_jax.evaluation.suite import Evaluated, PerRow, Suite
from conlens_jax.measurement.aggregates import fve_nrm_at, mean_of, ratio
from conlens_jax.measurement.bootstrap import Interval, Statistic
from conlens_jax.measurement.metrics import fraction_removed

OUTLIER = 3.0
"""An outlier's norm is this many times the median norm."""


def slices(suite: Suite) -> dict[str, np.ndarray]:
    """Which rows each part contains, [N]; empty parts are left out."""
    norm_N = np.linalg.norm(np.asarray(suite.rows.activations_ND, np.float64), axis=1)
    outlier_N = norm_N > OUTLIER * np.median(norm_N)
    parts = {"norm_outlier": outlier_N, "norm_ordinary": ~outlier_N}
    for name, values_N in (("position", suite.rows.positions_N), ("norm", norm_N)):
        low, high = np.quantile(values_N, (1 / 3, 2 / 3))
        parts[f"{name}_low"] = values_N <= low
        parts[f"{name}_middle"] = (values_N > low) & (values_N <= high)
        parts[f"{name}_high"] = values_N > high
    return {name: mask_N for name, mask_N in parts.items() if mask_N.any()}


def sliced(suite: Suite, evaluated: Evaluated) -> dict[str, Interval]:
    """``fve_nrm`` and ``kl_frac_mean`` of greedy text on each part, and its share of the rows.

    R is that of all training rows, so that a part's ``fve_nrm`` is relative to one common
    error; the mean activation's KL is that of the part.
    """
    per_row: PerRow = {}
    statistics: dict[str, Statistic] = {}
    resultant = suite.reference.resultant
    for name, mask_N in slices(suite).items():
        per_row[f"{name}.rows"] = mask_N
        for quantity in ("greedy.cos", "greedy.kl_at", "mean.kl_at"):
            per_row[f"{name}.{quantity}"] = mask_N * evaluated.per_row[quantity]
        statistics[f"{name}_rows"] = mean_of(f"{name}.rows")
        statistics[f"{name}_fve_nrm"] = lambda means, name=name: fve_nrm_at(
            ratio(means[f"{name}.greedy.cos"], means[f"{name}.rows"]), resultant
        )
        statistics[f"{name}_kl_frac_mean"] = lambda means, name=name: fraction_removed(
            means[f"{name}.greedy.kl_at"], means[f"{name}.mean.kl_at"]
        )
    return suite.intervals(statistics, per_row)
