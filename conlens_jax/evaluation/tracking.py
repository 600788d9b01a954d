"""The evaluation in W&B, in the run that trained the lens."""

from __future__ import annotations

import json
from pathlib import Path

from conlens_jax.config import ExperimentConfig, to_json_dict
from conlens_jax.parallel.processes import is_first
from conlens_jax.tracking.console import Console
from conlens_jax.tracking.wandb_run import RUN_ID, WandbRun

FILES = ("report.html", "metrics.json", "metrics.csv")


def track_evaluation(config: ExperimentConfig, run_folder: Path, console: Console) -> None:
    """``FILES`` as an artifact, and the numbers of ``metrics.json`` as the run's summary, under
    ``evaluation/``. Does nothing where ``wandb.mode`` is ``"disabled"``."""
    # A run that training began already has its configuration.
    values = {} if (run_folder / RUN_ID).exists() else to_json_dict(config)
    tracker = WandbRun(config.wandb, run_folder, values, enabled=is_first(), console=console)
    if not tracker.active:
        return
    metrics = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    tracker.summary({f"evaluation/{name}": value for name, value in metrics.items()})
    tracker.artifact("evaluation", [run_folder / name for name in FILES])
    tracker.finish()
