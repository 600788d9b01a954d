"""Run folders: whose they are, and the lens in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conlens_jax.config import ConfigError, ExperimentConfig, field_names, lookup, to_json_dict
from conlens_jax.models.param_table import Params
from conlens_jax.training.checkpoint import all_steps, restore_params
from conlens_jax.whole_files import write_whole

CONTROL, BASELINE, AUDIT = "control", "baseline", "audit"
"""Folders, inside a run's, of the stages beside it."""

# Fields that may differ between a run and its resumption: they change nothing of what is learned.
_FREE = ("run_dir", "train.resume", "train.log_every", "train.sample_every", "wandb", "evaluate")
_FREE += (
    "train.compile_cache",
    "train.n_verbose_samples",
    "checkpoint.keep_latest",
    "checkpoint.keep_best",
    # Where it runs: the sums of another mesh are rounded otherwise, nothing else changes.
    "mesh",
    "distributed",
    "launch",
    "profile",
)


def claim_folder(folder: Path, config: ExperimentConfig, *, write: bool = True) -> None:
    """Makes the run folder with its config.json, or checks that it is this run's. Without
    ``write`` it only checks: one of several processes writes.

    Raises:
      ConfigError: the folder holds another run, or one that is not to be resumed.
    """
    recorded = folder / "config.json"
    if recorded.exists() and all_steps(folder / "checkpoints"):
        if not config.train.resume:
            raise ConfigError(
                [
                    f"run_dir={str(folder)!r} holds checkpoints; choose another run_dir, or set "
                    "train.resume=True to go on with them"
                ]
            )
        before = json.loads(recorded.read_text(encoding="utf-8"))
        problems = [
            f"{name} is {lookup(config, name)!r}, and was {_nested(before, name)!r} when "
            f"{folder} was begun; choose another run_dir, or give the old value"
            for name in _leaf_names()
            if not name.startswith(_FREE) and _nested(before, name) != lookup(config, name)
        ]
        if problems:
            raise ConfigError(problems)
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(recorded, json.dumps(to_json_dict(config), indent=2) + "\n")


def _leaf_names() -> list[str]:
    names = list(field_names())
    sections = {name.rpartition(".")[0] for name in names}
    return [name for name in names if name not in sections]


def _nested(values: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        values = values.get(part, {}) if isinstance(values, Mapping) else {}
    return values


def checkpoint_of(path: str | Path) -> tuple[Path, int | None]:
    """(checkpoint folder, step) of a run folder, its ``checkpoints``, or one step in there."""
    path = Path(path)
    if path.name.isdigit() and (path / "state").exists():
        return path.parent, int(path.name)
    if (path / "checkpoints").is_dir():
        return path / "checkpoints", None
    return path, None


def load_lens(path: str | Path, template: Params, step: int | None = None) -> Params:
    """The trained parts of a checkpoint, on the template's shardings.

    Raises:
      CheckpointError: nothing there, or of another shape.
    """
    folder, named_step = checkpoint_of(path)
    return restore_params(folder, named_step if step is None else step, template)
