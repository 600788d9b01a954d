"""Statistics of each layer's activations, to choose model.layer: R, norms, and M's use of them.

Command:  python scripts/layer_sweep.py --run=runs/quickstart
Time:     25 CPU-seconds on the quickstart, most of them compilation; no training.

A layer with a small 1 − R² is flagged: nearly all its activations point in one direction, so a
cosine close to 1 means nothing. If the KL of the mean is small, M does not read the layer at P.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from jax.sharding import Mesh

from conlens_jax.checkpoint_flags import recorded_config
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.studies.slices import OUTLIER
from conlens_jax.lens.spec import LensSpec
from conlens_jax.measurement.runner import Measurer, activation_statistics
from conlens_jax.models.param_table import Params
from conlens_jax.tracking.console import Console
from conlens_jax.training.preflight import check_files
from conlens_jax.training.session import open_session

LOW_VARIANCE = 0.1
"""Where 1 − R² is below this, nearly all activations point one way: ``fve_nrm`` magnifies noise."""
HEADER = ["layer", "R", "1 − R²", "median norm", "outliers", "KL of mean", "KL of zero", ""]


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


def row_of(found: LayerStatistics) -> list[str]:
    """A row of the table."""
    return [
        str(found.layer),
        f"{found.resultant:.3f}",
        f"{found.variance:.3f}",
        f"{found.median_norm:.2f}",
        f"{found.outliers:.1%}",
        f"{found.kl_mean:.3f}",
        f"{found.kl_zero:.3f}",
        "low variance" if found.has_low_variance else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="run folder, whose held-out rows are read")
    parser.add_argument("--rows", type=int, default=1024, help="rows, at most")
    arguments = parser.parse_args()
    console = Console()
    config = recorded_config(arguments.run)
    check_files(config, evaluates=arguments.run)
    session = open_session(config, console, run=arguments.run)
    _, validation = session.caches
    rows = validation.rows(np.arange(min(arguments.rows, len(validation))))
    found = layer_statistics(
        session.model.params, rows, session.spec, session.mesh, session.config.evaluate.batch_size
    )
    console.table("layers", HEADER, [row_of(statistics) for statistics in found])


if __name__ == "__main__":
    main()
