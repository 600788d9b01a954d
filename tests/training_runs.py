"""Training in the world of pipeline.py: runs without what takes time, and their lenses."""

from __future__ import annotations

from pathlib import Path

from conlens_jax.lens.spec import init_lens
from conlens_jax.training import loop
from conlens_jax.training.run_folder import load_lens
from conlens_jax.training.session import Session, open_caches, training_reference
from conlens_jax.training.validation import Validation


def unvalidated(run, trainable, frozen) -> Validation:
    """In the place of validation, which takes seconds to compile and changes no loss."""
    return Validation({"kl_at_sampled": 1.0})


def plain(world, run_dir: Path, **changes) -> Session:
    """The world's training in another folder, without control and samples."""
    quiet = {"control__enabled": False, "train__n_verbose_samples": 0}
    return world.changed(run_dir, **{**quiet, **changes})


def lens_template(world):
    """(trainable, frozen) of the world's lens before any training."""
    train, _ = open_caches(world.session)
    reference = training_reference(train)
    session = world.session
    trainable, frozen = init_lens(
        session.model.params, session.spec, reference.mean_D, reference.scale
    )
    return loop.placed(trainable, session), frozen


def saved(world, run: Path, step: int):
    return load_lens(run / "checkpoints", lens_template(world)[0], step)
