"""A run while it trains: what its stages share, and how its arrays lie."""

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
from conlens_jax.models.param_table import Params
from conlens_jax.tracking.console import Console
from conlens_jax.tracking.wandb_run import WandbRun
from conlens_jax.training.session import Session


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder with everything its stages share; ``places`` is what its checkpoints record of
    folders (:mod:`conlens_jax.training.places`), ``warm_encoder`` is the encoder as the warm start
    left it, once that is over."""

    session: Session
    folder: Path
    train: RowSource
    validation: RowSource
    reference: ActivationStatistics
    measurer: Measurer
    tracker: WandbRun
    places: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warm_encoder: Params | None = None

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
    :func:`~conlens_jax.lens.sharding.lens_shardings`. What is restored into such a tree is on
    the mesh too."""
    return jax.device_put(tree, lens_shardings(tree, session.model.config, session.mesh))


def placed_frozen(frozen: Params, session: Session) -> Params:
    """The frozen parts on the mesh; the original model is there already."""
    small = {name: part for name, part in frozen.items() if name != "original"}
    return {"original": frozen["original"], **placed(small, session)}
