"""Which layer to read: the denominators of the metrics at each of them, before any training."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh

from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.studies.slices import OUTLIER
from conlens_jax.lens.spec import LensSpec
from conlens_jax.measurement.runner import Measurer, activation_statistics
from conlens_jax.models.param_table import Params

LOW_VARIANCE = 0.1
"""Where 1 − R² is below this, nearly all activations point one way: ``fve_nrm`` magnifies noise."""


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Of the activations of some rows at one layer.

    Attributes:
      resultant: R, norm of the mean of the unit vectors.
      median_norm: of the raw activations.
      outliers: share of the rows with more than three times the median norm.
      kl_mean, kl_zero: KL(M ‖ M with the mean, or with zeros, at P), nats; how much M
        depends on the activation.
    """

    layer: int
    resultant: float
    median_norm: float
    outliers: float
    kl_mean: float
    kl_zero: float

    @property
    def variance(self) -> float:
        """``1 − R²``, the denominator of ``fve_nrm``."""
        return 1 - self.resultant**2

    @property
    def has_low_variance(self) -> bool:
        return self.variance < LOW_VARIANCE


def layer_statistics(
    original: Params, rows: Rows, spec: LensSpec, mesh: Mesh, batch_size: int
) -> list[LayerStatistics]:
    """Statistics of every layer on the same rows; their stored activations are not used."""
    found = []
    for layer in range(spec.model.n_layers):
        here = dataclasses.replace(spec, layer=layer)
        measurer = Measurer(here, mesh, horizon=1, batch_size=batch_size, seed=0)
        activations_ND = measurer.with_activations(original, rows).activations_ND
        reference = activation_statistics(activations_ND)
        swaps = {
            "mean": np.broadcast_to(reference.mean_D, activations_ND.shape),
            "zero": np.zeros_like(activations_ND),
        }
        effects = measurer.effects(original, rows, swaps)
        norm_N = np.linalg.norm(activations_ND.astype(np.float64), axis=1)
        median = float(np.median(norm_N))
        found.append(
            LayerStatistics(
                layer=layer,
                resultant=reference.resultant,
                median_norm=median,
                outliers=float(np.mean(norm_N > OUTLIER * median)),
                kl_mean=float(effects["mean"].kl_at.mean()),
                kl_zero=float(effects["zero"].kl_at.mean()),
            )
        )
    return found
