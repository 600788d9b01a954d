"""A tiny world for tests of the whole way: model, caches and a finished run, made once a session.

Tests read the world; one that changes a folder works on a copy of it (:meth:`World.copy_cache`,
:meth:`World.copy_run`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.compilation_cache import compilation_cache

from conlens_jax.config import ExperimentConfig, with_changes
from conlens_jax.data.extract import dump_activations
from conlens_jax.lens.objective import Objective
from conlens_jax.lens.spec import make_spec
from conlens_jax.tracking.console import Console
from conlens_jax.tracking.records import read_metrics
from conlens_jax.training import loop
from conlens_jax.training.loop import train_lens
from conlens_jax.training.session import Session, open_session
from conlens_jax.training.state import make_step

# The control has the warm start's length and schedule, so that it needs no program of its own.
WARM_STEPS, JOINT_STEPS, CONTROL_STEPS = 12, 6, 12
CHECKPOINT_EVERY = 3
LAST_STEP = WARM_STEPS + JOINT_STEPS

# Batches divide over the 8 virtual devices of the tests; every step is logged, so that two runs
# can be compared step by step.
TINY: dict[str, Any] = {
    "model.layer": 1,
    "model.unroll": 1,
    "embedded.d_model": 16,
    "embedded.n_layers": 3,
    "embedded.n_heads": 2,
    "embedded.n_kv_heads": 1,
    "embedded.d_mlp": 32,
    "embedded.vocab_size": 320,
    "embedded.steps": 30,
    "embedded.batch_size": 16,
    "embedded.seq_len": 64,
    "embedded.learning_rate": 1e-2,
    "corpus.n_documents": 400,
    "corpus.max_tokens": 16,
    "corpus.validation_fraction": 0.2,
    "dump.seq_len": 40,
    "dump.n_samples": 192,
    "dump.n_validation_samples": 64,
    "dump.positions_per_sequence": 2,
    "dump.batch_size": 16,
    "dump.rows_per_shard": 48,
    "lens.text_len": 4,
    "lens.decoder_prompt": "<embed>",
    "warm.before": 3,
    "warm.after": 1,
    "warm.steps": WARM_STEPS,
    "warm.batch_size": 16,
    "warm.optimizer.learning_rate.start": 1e-2,
    "warm.optimizer.learning_rate.end": 2e-4,
    "warm.optimizer.learning_rate.warmup": 0.0,
    "joint.steps": JOINT_STEPS,
    "joint.batch_size": 16,
    "control.enabled": True,
    "control.steps": CONTROL_STEPS,
    "control.optimizer.learning_rate.start": 1e-2,
    "control.optimizer.learning_rate.end": 2e-4,
    "control.optimizer.learning_rate.warmup": 0.0,
    "train.log_every": 1,
    "train.validate_every": 6,
    "train.sample_every": 100,
    "train.validation_rows": 32,
    "train.n_verbose_samples": 2,
    "checkpoint.every": CHECKPOINT_EVERY,
    "wandb.mode": "disabled",
    "evaluate.rows": 48,
    "evaluate.batch_size": 16,
    "evaluate.bootstrap": 40,
    "evaluate.n_examples": 4,
    "evaluate.kl_horizon": 2,
}


def tiny_config(root: Path, **changes: Any) -> ExperimentConfig:
    """The tiny configuration with its folders under ``root``; ``__`` in a name stands for a dot."""
    folders = {
        "run_dir": str(root / "run"),
        "dump.cache_dir": str(root / "cache"),
        "embedded.cache_dir": str(root / "models"),
    }
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return with_changes(ExperimentConfig(), {**TINY, **folders, **dotted})


def quiet_console() -> tuple[Console, io.StringIO]:
    """A console and what it will have printed."""
    stream = io.StringIO()
    return Console(stream, interactive=False), stream


@dataclasses.dataclass(frozen=True)
class World:
    """A trained tiny model, its caches and a finished run (warm, joint, control).

    Attributes:
      root: the folder of everything.
      setting: model, mesh and lens, loaded.
      stream: what the making of all this said on the console.
    """

    root: Path
    session: Session
    stream: io.StringIO

    @property
    def config(self) -> ExperimentConfig:
        return self.session.config

    @functools.cached_property
    def run(self) -> Path:
        """The run's folder; it is trained at first use, which takes the most time of all."""
        return train_lens(self.session)

    @property
    def cache(self) -> Path:
        return Path(self.config.dump.cache_dir)

    def changed(self, run_dir: Path, **changes: Any) -> Session:
        """The setting with another run folder and other fields; the loaded model is shared.

        Only for fields that leave model and tokenizer as they are.
        """
        dotted = {name.replace("__", "."): value for name, value in changes.items()}
        config = with_changes(self.config, {"run_dir": str(run_dir), **dotted})
        return resettled(self.session, config)

    def copy_cache(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.cache, folder))

    def copy_run(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.run, folder))


def resettled(session: Session, config: ExperimentConfig) -> Session:
    """A setting of another config around the model that is loaded already."""
    spec = make_spec(session.model.config, config.model.layer, config.lens, session.model.tokenizer)
    objective = Objective(config.loss, config.warm, spec)
    console, _ = quiet_console()
    return dataclasses.replace(
        session, config=config, console=console, spec=spec, objective=objective
    )


@contextlib.contextmanager
def quick_compilation(tmp_path_factory) -> Iterator[None]:
    """Compiles with little optimisation, and every program only once a session.

    Compilation is nearly all the time of these tests; two runs of one config share theirs, and so
    do the workers of pytest-xdist, whose folders lie in one.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    for name, (value, _) in _compiler_settings(str(folder / "compiled")).items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, (_, default) in _compiler_settings(str(folder)).items():
            jax.config.update(name, default)
        compilation_cache.reset_cache()


def child_settings() -> dict[str, Any]:
    """Settings of JAX with which another process computes the same bits, from the same compiled
    programs."""
    folder = jax.config.jax_compilation_cache_dir
    compiler = {name: value for name, (value, _) in _compiler_settings(folder).items()}
    return {
        "jax_num_cpu_devices": jax.device_count(),
        "jax_numpy_dtype_promotion": "strict",
        **compiler,
    }


def _compiler_settings(folder: str) -> dict[str, tuple[Any, Any]]:
    """Name → value here and JAX's default."""
    return {
        "jax_disable_most_optimizations": (True, False),
        "jax_compilation_cache_dir": (folder, None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
        "jax_persistent_cache_min_entry_size_bytes": (-1, 0),
    }


COMPILED_STEPS: dict[Any, jax.stages.Compiled] = {}


@contextlib.contextmanager
def shared_steps() -> Iterator[None]:
    """Runs of the same settings share their compiled steps: tracing one again takes seconds."""

    def make_shared(stage, objective, optimizer, **settings):
        step = make_step(stage, objective, optimizer, **settings)
        # A program knows neither the stage's name nor the steps before it.
        own = dataclasses.replace(stage, name=str(stage.supervised), first_step=0)
        return _SharedStep(step, (own, objective, settings["seed"], settings["n_rows"]))

    with mock.patch.object(loop, "make_step", make_shared):
        yield


class _SharedStep:
    """A step whose ``lower(…).compile()`` compiles only what is not in ``COMPILED_STEPS``."""

    def __init__(self, step, settings: tuple):
        self._step, self._settings = step, settings

    def lower(self, *inputs) -> _SharedStep:
        leaves, structure = jax.tree.flatten(inputs)
        arrays = tuple((leaf.aval, leaf.sharding) for leaf in leaves)
        self._inputs, self._key = inputs, (*self._settings, structure, arrays)
        return self

    def compile(self) -> jax.stages.Compiled:
        if self._key not in COMPILED_STEPS:
            COMPILED_STEPS[self._key] = self._step.lower(*self._inputs).compile()
        return COMPILED_STEPS[self._key]


def small_arrays_whole() -> contextlib.AbstractContextManager:
    """Checkpoints write a small array in one piece. By default each of eight devices writes an
    eighth of it, which takes half a second a save; test_checkpoint and other processes do that."""
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    return mock.patch.object(handler, "_min_slice_bytes_for_replica_parallel", 1 << 20)


@functools.cache
def make_world(root: Path, **changes: Any) -> World:
    """Model and caches below ``root``, made once a session."""
    console, stream = quiet_console()
    session = open_session(tiny_config(root, **changes), console)
    dump_activations(session.config, session.model, session.spec, session.mesh, console)
    return World(root, session, stream)


@contextlib.contextmanager
def open_world(tmp_path_factory) -> Iterator[World]:
    """The session's world, for a module's fixture."""
    with quick_compilation(tmp_path_factory), shared_steps(), small_arrays_whole():
        yield make_world(tmp_path_factory.getbasetemp() / "world")


def losses(run: Path) -> list[tuple[str, int, float]]:
    """(stage, step, loss) of every logged training step, in the order of the file."""
    return [
        (record["stage"], record["step"], record["loss"])
        for record in read_metrics(run / "metrics.jsonl")
        if "loss" in record
    ]


def assert_same_arrays(first, second) -> None:
    """Bit-equal trees."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
