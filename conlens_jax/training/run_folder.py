"""Run folders: which run they belong to, and the lens in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conlens_jax.config import (
    EMBEDDED_MODEL,
    ConfigError,
    ExperimentConfig,
    field_names,
    lookup,
    to_json_dict,
)
from conlens_jax.config.older import updated
from conlens_jax.files.paths import PATH_FIELDS, expanded, local_path
from conlens_jax.files.whole import write_whole
from conlens_jax.models.model import LanguageModel
from conlens_jax.models.param_table import Params
from conlens_jax.training.checkpoint import all_steps, best_step, restore_params, step_of
from conlens_jax.training.places import MOVABLE, metadata_of_run, resumption_problems

CONTROL, BASELINE, AUDIT, NEXT_WORDS = "control", "baseline", "audit", "next_words"
"""Sub-folders of a run for the stages that are compared with it."""
LATEST = ("latest", "last")
"""Words for the newest checkpoint, instead of a step."""

# Fields that may change when a run is resumed: they do not affect what is learned.
_FREE = ("run_dir", "train.resume", "train.log_every", "train.sample_every", "wandb", "evaluate")
_FREE += (
    "train.compile_cache",
    "train.n_verbose_samples",
    "checkpoint.keep_latest",
    "checkpoint.keep_best",
    # Where it runs: another mesh rounds sums differently, nothing else changes.
    "mesh",
    "distributed",
    "launch",
    "profile",
)


def claim_folder(
    folder: Path,
    config: ExperimentConfig,
    *,
    write: bool = True,
    model: LanguageModel | None = None,
) -> Mapping[str, Any]:
    """Creates the run folder with its config.json, or checks that it is this run's. Without
    ``write`` it only checks: only the first process writes. Without a ``model`` the weights are not
    compared.

    Returns:
      The metadata of the run's checkpoints; empty if it has none.

    Raises:
      ConfigError: the folder contains another run, or one and ``train.resume`` is off.
    """
    recorded, metadata = folder / "config.json", metadata_of_run(folder)
    if recorded.exists() and all_steps(folder / "checkpoints"):
        if not config.train.resume:
            raise ConfigError(
                f"run_dir={str(folder)!r} has checkpoints; choose another run_dir, or set "
                "train.resume=True to continue from them"
            )
        before = updated(json.loads(recorded.read_text(encoding="utf-8")))
        # Without recorded places, contents cannot be compared: paths must be the same.
        free = (*_FREE, *MOVABLE) if metadata.get("places") else _FREE
        problems = [
            f"{name} is {lookup(config, name)!r}, and was {_recorded(before, name)!r} when "
            f"{folder} was started; choose another run_dir, or give the old value"
            for name in _leaf_names()
            if not name.startswith(free)
            and _recorded(before, name) != _plain(config, name)
            and not _same_bos(name, _recorded(before, name), config)
        ]
        problems += resumption_problems(config, metadata, model)
        if problems:
            raise ConfigError(problems)
    if not write:
        return metadata
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(recorded, json.dumps(to_json_dict(config), indent=2) + "\n")
    return metadata


def _plain(config: ExperimentConfig, dotted: str) -> Any:
    """A field's value after a round trip through JSON: tuples are lists."""
    return json.loads(json.dumps(lookup(config, dotted)))


def _same_bos(name: str, before: Any, config: ExperimentConfig) -> bool:
    """Whether ``dump.add_bos``, formerly a bool, has the same effect. The embedded tokenizer adds a
    bos token by default."""
    if name != "dump.add_bos" or not isinstance(before, bool):
        return False
    own = config.dump.add_bos == "auto" and config.model.path == EMBEDDED_MODEL
    return config.dump.add_bos == str(before).lower() or (before and own)


def _leaf_names() -> list[str]:
    names = list(field_names())
    sections = {name.rpartition(".")[0] for name in names}
    return [name for name in names if name not in sections]


def _recorded(values: Mapping[str, Any], dotted: str) -> Any:
    """A field of a recorded config; its default if the field is newer than the record."""
    value: Any = values
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return json.loads(json.dumps(lookup(ExperimentConfig(), dotted)))
        value = value[part]
    return expanded(value) if dotted in PATH_FIELDS else value


def chosen_checkpoint(path: str | Path, step: int | str | None) -> tuple[Path, int]:
    """(checkpoint folder, step) of a run folder and ``--step``.

    Args:
      step: ``"latest"`` (or ``"last"``, None), ``"best"`` by validation, or a step. Ignored if
        ``path`` is the folder of one step.

    Raises:
      ValueError: there is no such checkpoint, or ``step`` is another word.
    """
    folder, named_step = checkpoint_of(path)
    if named_step is not None:
        return folder, named_step
    if step == "best":
        return folder, _best_step(folder)
    wanted = None if step in (None, *LATEST) else _step_number(step)
    return folder, step_of(folder, wanted)


def _step_number(step: int | str) -> int:
    try:
        return int(step)
    except ValueError:
        raise ValueError(f"step must be latest, last, best or a number, not {step!r}") from None


def _best_step(folder: Path) -> int:
    step = best_step(folder)
    if step is None:
        raise ValueError(f"step='best': no checkpoint in {folder} was validated; use step='latest'")
    return step


def checkpoint_of(path: str | Path) -> tuple[Path, int | None]:
    """(checkpoint folder, step) of a run folder, its ``checkpoints``, or one step in it."""
    path = local_path(path)
    if path.name.isdigit() and (path / "state").exists():
        return path.parent, int(path.name)
    if (path / "checkpoints").is_dir():
        return path / "checkpoints", None
    return path, None


def load_lens(path: str | Path, template: Params, step: int | None = None) -> Params:
    """The trained parts of a checkpoint, on the template's shardings.

    Raises:
      CheckpointError: there is no checkpoint, or its shapes differ.
    """
    folder, named_step = checkpoint_of(path)
    return restore_params(folder, named_step if step is None else step, template)
