"""The flags that name a checkpoint, and the configuration that its run recorded."""

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

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run folder, or a checkpoint in it.")
STEP = flags.DEFINE_string("step", "latest", "Checkpoint of a run folder: latest, best, or a step.")


def recorded_config(checkpoint: str) -> ExperimentConfig:
    """The configuration that a run was made with, but for the processes that it was made in.

    Raises:
      ConfigError: the folder is no run.
    """
    folder, _ = checkpoint_of(checkpoint)
    file = Path(folder).parent / "config.json"
    if not file.exists():
        raise ConfigError([f"--checkpoint={checkpoint}: there is no {file}; give a run folder"])
    recorded = from_config_dict(json.loads(file.read_text(encoding="utf-8")))
    return dataclasses.replace(recorded, distributed=DistributedConfig())
