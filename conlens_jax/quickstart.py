"""The whole pipeline on the embedded model and stories: python -m conlens_jax.quickstart

Trains the small language model at first use, dumps activations, trains a lens with its control,
evaluates it, and prints the path of the report. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

from conlens_jax import cli
from conlens_jax.config import ExperimentConfig
from conlens_jax.data.extract import dump_activations
from conlens_jax.evaluation.run import evaluate_run
from conlens_jax.parallel.processes import is_first
from conlens_jax.tracking.console import Console
from conlens_jax.training.loop import train_lens
from conlens_jax.training.preflight import check_files
from conlens_jax.training.session import open_session

_CONFIG = cli.define_config(str(Path(__file__).parents[1] / "configs" / "quickstart.py"))


def run_quickstart(config: ExperimentConfig, console: Console) -> Path:
    """dump (unless rows are streamed) → train → evaluate; returns the path of the report."""
    check_files(config, dumps=config.data.source == "cache", trains=True)
    session = open_session(config, console, run=config.run_dir)
    if config.data.source == "cache":
        dump_activations(session.config, session.model, session.spec, session.mesh, console)
    folder = train_lens(session)
    return evaluate_run(session, folder)


def main() -> None:
    config = cli.load_config(_CONFIG)
    report = run_quickstart(config, cli.start(config))
    if is_first():
        print(report.absolute())


if __name__ == "__main__":
    cli.run(main)
