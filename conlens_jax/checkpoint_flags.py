"""The flags that select a checkpoint, and the configuration recorded by its run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from absl import flags

from conlens_jax.config import (
    ConfigError,
    DistributedConfig,
    ExperimentConfig,
    from_config_dict,
)
from conlens_jax.training.run_folder import checkpoint_of

CHECKPOINTS = flags.DEFINE_multi_string("checkpoint", None, "Run folder, or a checkpoint in it.")
STEP = flags.DEFINE_string("step", "latest", "Checkpoint of a run folder: latest, best, or a step.")


def one_checkpoint() -> str | None:
    """The value of ``--checkpoint``, None if it was not given.

    Raises:
      ConfigError: it was given more than once.
    """
    given = CHECKPOINTS.value or []
    if len(given) > 1:
        raise ConfigError(f"--checkpoint is given {len(given)} times; this command takes one")
    return given[0] if given else None


def recorded_config(checkpoint: str) -> ExperimentConfig:
    """The configuration of a run, without its ``distributed`` section.

    Raises:
      ConfigError: the folder is not a run.
    """
    folder, _ = checkpoint_of(checkpoint)
    file = Path(folder).parent / "config.json"
    if not file.exists():
        raise ConfigError(f"--checkpoint={checkpoint}: there is no {file}; give a run folder")
    recorded = from_config_dict(json.loads(file.read_text(encoding="utf-8")))
    return dataclasses.replace(recorded, distributed=DistributedConfig())
