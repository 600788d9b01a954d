"""Percentile bootstrap with the document as the unit.

Rows of one document are alike, so resampling rows would make every interval too narrow. All our
metrics are functions of means over rows, and the mean of a resample needs only each document's sum
and size: the resamples are one matrix of counts, drawn once, and every metric is a matrix product.
Sharing that matrix also pairs the metrics: a difference of two systems is taken inside a resample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from conlens_jax.measurement.metrics import Float64Array

Statistic = Callable[[Mapping[str, Float64Array]], npt.ArrayLike]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval; the ends are NaN where it has no interval."""

    value: float
    lo: float = float("nan")
    hi: float = float("nan")


@dataclasses.dataclass(frozen=True)
class DocumentBootstrap:
    """Resamples of one set of rows; make it with :meth:`draw` and use it for every metric.

    Attributes:
      group_N: index of each row's document.
      counts_RG: how often each of the G documents is in each resample; row 0 is the data itself.
    """

    group_N: npt.NDArray[np.intp]
    counts_RG: Float64Array

    @classmethod
    def draw(cls, documents_N: npt.ArrayLike, n_resamples: int, seed: int) -> DocumentBootstrap:
        """Draws ``n_resamples`` sets of documents with replacement (memory: 8 bytes per resample
        and document).

        Args:
          documents_N: document id of each row, integers or strings.

        Raises:
          ValueError: no rows, more than one axis, or fewer than one resample.
        """
        documents = np.asarray(documents_N)
        if documents.ndim != 1 or documents.size == 0:
            raise ValueError(f"documents_N must be one id per row, not shape {documents.shape}")
        if n_resamples < 1:
            raise ValueError(f"n_resamples must be at least 1, not {n_resamples}")
        names, group_N = np.unique(documents, return_inverse=True)
        n_documents = len(names)
        rng = np.random.default_rng(seed)
        counts_RG = np.ones((n_resamples + 1, n_documents))
        for resample in range(1, n_resamples + 1):
            picked = rng.integers(n_documents, size=n_documents)
            counts_RG[resample] = np.bincount(picked, minlength=n_documents)
        return cls(group_N.reshape(-1), counts_RG)

    def means(self, per_row: Mapping[str, npt.ArrayLike]) -> dict[str, Float64Array]:
        """The mean of each quantity in the data (entry 0) and in every resample, ``[1 + R]``.

        A row that is not finite makes the mean NaN or infinite: nothing is dropped silently.

        Raises:
          ValueError: an array that is not one number per row; all of them in one message.
        """
        arrays = {name: np.asarray(values, np.float64) for name, values in per_row.items()}
        wrong = {n: a.shape for n, a in arrays.items() if a.shape != self.group_N.shape}
        if wrong:
            listed = ", ".join(f"{name} {shape}" for name, shape in wrong.items())
            raise ValueError(f"per-row arrays must have shape {self.group_N.shape}: {listed}")
        if not arrays:
            return {}
        columns = [np.ones(len(self.group_N)), *arrays.values()]
        n_documents = self.counts_RG.shape[1]
        with np.errstate(invalid="ignore", over="ignore"):
            sums_GM = np.stack([np.bincount(self.group_N, c, n_documents) for c in columns], axis=1)
            totals_RM = self.counts_RG @ sums_GM
            means_RM = totals_RM[:, 1:] / totals_RM[:, :1]
        return dict(zip(arrays, means_RM.T, strict=True))

    def interval(
        self, statistic: Statistic, per_row: Mapping[str, npt.ArrayLike], level: float = 0.95
    ) -> Interval:
        """The statistic on the data with its percentile interval.

        Args:
          statistic: from named means, each ``[1 + R]``, to one value per entry, elementwise.
          per_row: the quantities it needs, one number per row.
          level: share of the resamples inside the interval.
        """
        return percentile_interval(self._values(statistic, per_row), level)

    def difference(
        self,
        statistic: Statistic,
        per_row: Mapping[str, npt.ArrayLike],
        baseline_per_row: Mapping[str, npt.ArrayLike],
        level: float = 0.95,
    ) -> Interval:
        """Interval of the statistic minus the same of a baseline on the same rows, paired.

        What the two systems share (hard documents, an unlucky reference) cancels inside a
        resample, so this is narrower than what two separate intervals suggest.
        """
        values = self._values(statistic, per_row)
        with np.errstate(invalid="ignore"):
            return percentile_interval(values - self._values(statistic, baseline_per_row), level)

    def _values(self, statistic: Statistic, per_row: Mapping[str, npt.ArrayLike]) -> Float64Array:
        values = np.asarray(statistic(self.means(per_row)), np.float64)
        if values.shape != self.counts_RG.shape[:1]:
            raise ValueError(
                f"statistic must return one value per resample {self.counts_RG.shape[:1]}, "
                f"not {values.shape}: it gets vectors of means and must work elementwise"
            )
        return values


def percentile_interval(values: Float64Array, level: float = 0.95) -> Interval:
    """The first value with the percentile interval of the others.

    A ratio whose denominator is 0 in some resamples is infinite there; its interval keeps the
    lower end. There is no interval where the value itself is not finite or a resample is NaN.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    value, resamples = float(values[0]), values[1:]
    if not np.isfinite(value) or np.isnan(resamples).any():
        return Interval(value)
    # Infinite resamples cannot be interpolated: take the lower one.
    method = "linear" if np.isfinite(resamples).all() else "lower"
    lo, hi = np.quantile(resamples, [(1 - level) / 2, (1 + level) / 2], method=method)
    return Interval(value, float(lo), float(hi))
