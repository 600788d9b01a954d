"""Statistics of each layer's activations, to choose model.layer: R, norms, and M's use of them.

Command:  python scripts/layer_sweep.py --run=runs/quickstart
Time:     25 CPU-seconds on the quickstart, most of them compilation; no training.

A layer with a small 1 − R² is flagged: nearly all its activations point in one direction, so a
cosine close to 1 means nothing. If the KL of the mean is small, M does not read the layer at P.
"""

from __future__ import annotations

import argparse

import numpy as np

from conlens_jax.checkpoint_flags import recorded_config
from conlens_jax.evaluation.studies.layers import LayerStatistics, layer_statistics
from conlens_jax.tracking.console import Console
from conlens_jax.training.preflight import check_files
from conlens_jax.training.session import open_session

HEADER = ["layer", "R", "1 − R²", "median norm", "outliers", "KL of mean", "KL of zero", ""]


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
