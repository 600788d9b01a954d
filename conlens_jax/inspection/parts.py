"""The parts of a loaded lens."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from conlens_jax.evaluation.support import Calibration
from conlens_jax.lens.spec import LensSpec
from conlens_jax.measurement.training_range import TrainingRange
from conlens_jax.models.model import LanguageModel
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.mesh import single_device_mesh


@dataclasses.dataclass(frozen=True)
class LensParts:
    """Decoder and encoder of a consistency lens, with the model that they read.

    Attributes:
      model: the language model M.
      spec: shape of the lens.
      trainable, frozen: its parameters, see :mod:`conlens_jax.lens.spec`.
      mesh: the devices that they are on.
      add_bos: whether texts begin with the bos token, as they did in training.
      facts: the lens's origin: model, layer, stage and step of the checkpoint, and the first
        position of its training rows.
      metrics: of the evaluation, if there was one.
      trained_on: positions, norms and tokens of the training rows, as far as they are recorded.
      calibration: how far the claims of its texts can be believed, if the evaluation measured it.
      least_length: texts are padded to at least this many tokens, so that shorter ones share their
        compiled programs.
    """

    model: LanguageModel
    spec: LensSpec
    trainable: Params
    frozen: Params
    mesh: Mesh = dataclasses.field(default_factory=single_device_mesh)
    add_bos: bool = True
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)
    trained_on: TrainingRange = TrainingRange()
    calibration: Calibration | None = None
    least_length: int = 1
