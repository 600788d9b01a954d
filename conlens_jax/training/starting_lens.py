"""The lens that a run begins with, if that is a given one (``train.init_from``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.files.paths import local_path
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
        return trainable  # what is not trained is not stored either
    return renormalised(
        trainable,
        (statistics["mean"], statistics["scale"]),
        (reference.mean_D, reference.scale),
    )


def starting_lens_problem(path: str) -> str | None:
    """Why a run cannot begin with the lens in ``path``, as far as can be seen without a model."""
    if _is_saved(path) or all_steps(checkpoint_of(path)[0]):
        return None
    return f"train.init_from={path!r}: there is no checkpoint there, and it is no saved lens"


def _is_saved(path: str) -> bool:
    folder = local_path(path)
    return saved.is_saved_lens(folder) if folder.is_dir() else (saved.SHIPPED / path).is_dir()


def _read(path: str, template: Params) -> tuple[Params, Mapping[str, Any]]:
    if not _is_saved(path):
        folder, step = checkpoint_of(path)
        step = step_of(folder, step)
        metadata = read_metadata(folder, step)
        return restore_params(folder, step, template), metadata["statistics"]
    folder = saved.resolve(path)
    statistics = saved.read_json(folder / saved.CONFIG)["statistics"]
    try:
        return saved.read_parts(folder, template, "this run's model, layer and lens"), statistics
    except ValueError as error:
        raise CheckpointError(f"train.init_from={path!r}: {error}") from error
