"""The lens that a run begins with, if that is a given one (``train.init_from``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conlens_jax.lens import saved
from conlens_jax.lens.spec import renormalised
from conlens_jax.measurement.runner import ActivationStatistics
from conlens_jax.models.param_table import Params
from conlens_jax.training.checkpoint import all_steps, read_metadata, restore_params, step_of
from conlens_jax.training.checkpoint_storage import CheckpointError
from conlens_jax.training.run_folder import checkpoint_of


def starting_lens(path: str, template: Params, reference: ActivationStatistics) -> Params:
    """The trained parts of a run, of one of its checkpoints, or of a saved lens, such that they do
    to an activation what they did there, though this run normalises activations in another way.

    Args:
      template: the trained parts of this run's lens.
      reference: of this run's activations.

    Raises:
      CheckpointError: there is no lens, or it has another shape.
    """
    trainable, statistics = _read(path, template)
    if any("projection" not in parts for parts in trainable.values()):
        # Projections that are not trained cannot make up for other statistics.
        return trainable
    return renormalised(
        trainable,
        (statistics["mean"], statistics["scale"]),
        (reference.mean_D, reference.scale),
    )


def starting_lens_problem(path: str) -> str | None:
    """Why a run cannot begin with the lens in ``path``, as far as can be seen without a model."""
    if _saved_folder(path) or all_steps(checkpoint_of(path)[0]):
        return None
    return f"train.init_from={path!r}: there is no checkpoint there, and it is no saved lens"


def _saved_folder(path: str) -> Path | None:
    """The folder of a saved lens; None: it is no saved lens."""
    folder = saved.local_folder(path)
    return folder if folder is not None and saved.is_saved_lens(folder) else None


def _read(path: str, template: Params) -> tuple[Params, Mapping[str, Any]]:
    folder = _saved_folder(path)
    if folder is None:
        checkpoints, step = checkpoint_of(path)
        step = step_of(checkpoints, step)
        statistics = read_metadata(checkpoints, step)["statistics"]
        return restore_params(checkpoints, step, template), statistics
    statistics = saved.read_json(folder / saved.CONFIG)["statistics"]
    try:
        return saved.read_parts(folder, template, "this run's model, layer and lens"), statistics
    except ValueError as error:
        raise CheckpointError(f"train.init_from={path!r}: {error}") from error
