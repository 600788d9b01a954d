"""A training run: what its stages share, and the placement of its arrays on the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from conlens_jax.config import ExperimentConfig
from conlens_jax.data.rows import RowSource
from conlens_jax.lens.sharding import lens_shardings
from conlens_jax.measurement.runner import ActivationStatistics, Measurer
from conlens_jax.measurement.training_range import TrainingRange
from conlens_jax.models.param_table import Params
from conlens_jax.tracking.console import Console
from conlens_jax.tracking.wandb_run import WandbRun
from conlens_jax.training.session import Session


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder with everything its stages share.

    Attributes:
      places: the folders that its checkpoints record (:mod:`conlens_jax.training.places`).
      warm_encoder: the encoder at the end of the warm start, None before.
      trained_on: recorded with its checkpoints.
    """

    session: Session
    folder: Path
    train: RowSource
    validation: RowSource
    reference: ActivationStatistics
    measurer: Measurer
    tracker: WandbRun
    places: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warm_encoder: Params | None = None
    trained_on: TrainingRange | None = None

    @property
    def config(self) -> ExperimentConfig:
        return self.session.config

    @property
    def console(self) -> Console:
        return self.session.console

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"


def placed(tree: Any, session: Session) -> Any:
    """A lens or its train state on the mesh, see
    :func:`~conlens_jax.lens.sharding.lens_shardings`."""
    return jax.device_put(tree, lens_shardings(tree, session.model.config, session.mesh))


def placed_frozen(frozen: Params, session: Session) -> Params:
    """The frozen parts on the mesh; the original model already is."""
    small = {name: part for name, part in frozen.items() if name != "original"}
    return {"original": frozen["original"], **placed(small, session)}
