"""What stops a training: steps that are not finite, caches that do not fit, a full disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import resource
import sys
import time

import jax
import numpy as np
import pytest
from pipeline import (
    CHECKPOINT_EVERY,
    WARM_STEPS,
    assert_same_arrays,
    losses,
    open_world,
    quiet_console,
)
from training_runs import plain, saved, unvalidated

from conlens_jax.config import ConfigError
from conlens_jax.data.cache_metadata import CacheError
from conlens_jax.tracking.records import read_metrics
from conlens_jax.training import stage_loop
from conlens_jax.training.checkpoint import Checkpoints, all_steps
from conlens_jax.training.loop import train_lens
from conlens_jax.training.stopped import TrainingStopped


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        world.run  # noqa: B018 (trained now, so that no test's time is this)
        yield world


@pytest.fixture
def unwatched(monkeypatch):
    monkeypatch.setattr(stage_loop, "validate", unvalidated)


# --- steps that are not finite ------------------------------------------------------------------


def poison(monkeypatch, is_bad) -> None:
    """NaN activations in the batches of the steps for which ``is_bad(step)``, counted from 1."""
    read = stage_loop.StageLoop._read

    def poisoned(self, index):
        batch = read(self, index)
        if is_bad(self.stage.first_step + index + 1):
            batch = batch.replace(activation_BD=batch.activation_BD * np.float32("nan"))
        return batch

    monkeypatch.setattr(stage_loop.StageLoop, "_read", poisoned)


def test_steps_that_are_not_finite_are_skipped_and_counted(world, tmp_path, unwatched, monkeypatch):
    poison(monkeypatch, lambda step: step in (4, 5, 6))
    console, stream = quiet_console()
    session = plain(world, tmp_path / "run", joint__steps=0, checkpoint__keep_latest=30)
    run = train_lens(dataclasses.replace(session, console=console))
    records = {r["step"]: r for r in read_metrics(run / "metrics.jsonl") if "loss" in r}
    assert [step for step, record in records.items() if record["loss"] is None] == [4, 5, 6]
    assert [records[step]["bad_steps_in_a_row"] for step in range(3, 8)] == [0, 1, 2, 3, 0]
    assert records[WARM_STEPS]["bad_steps"] == 3
    assert "3 non-finite steps skipped" in stream.getvalue()
    before, after, later = (saved(world, run, step) for step in (3, 6, 9))
    assert_same_arrays(before, after)
    kernels = [np.asarray(lens["decoder"]["projection"]["kernel"]) for lens in (after, later)]
    assert np.isfinite(kernels[1]).all() and (kernels[0] != kernels[1]).any()


def test_too_many_bad_steps_in_a_row_stop_the_run(world, tmp_path, unwatched, monkeypatch):
    session = plain(world, tmp_path / "run", joint__steps=0, warm__optimizer__max_bad_steps=3)
    with monkeypatch.context() as patch:
        poison(patch, lambda step: step == 2 or step >= 5)
        with pytest.raises(TrainingStopped) as caught:
            train_lens(session)
    last_good = tmp_path / "run" / "checkpoints" / "6"
    assert str(last_good) in str(caught.value) and "max_bad_steps=3" in str(caught.value)
    assert [step for _, step, _ in losses(tmp_path / "run")] == list(range(1, 7))
    assert all_steps(last_good.parent)[-1] == 6
    for leaf in jax.tree.leaves(saved(world, tmp_path / "run", 6)):
        assert np.isfinite(leaf).all()
    # What the message promises: the run goes on from there.
    train_lens(session)
    after = [loss for _, step, loss in losses(tmp_path / "run") if step > 6]
    assert len(after) == WARM_STEPS - 6 and None not in after


# --- caches and disks that do not fit -----------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"weights_hash": "f00", "model_id": "other/model"}, "model.path"),
        ({"layer": 2}, "model.layer: the cache has 2, this run has 1"),
        ({"tokenizer_hash": "f00"}, "tokenizer"),
        ({"schema_version": 99}, "schema_version 99"),
    ],
    ids=["model", "layer", "tokenizer", "version"],
)
def test_cache_of_another_model_is_refused(world, tmp_path, values, named):
    cache = world.copy_cache(tmp_path / "cache")
    for file in cache.glob("*/metadata.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(CacheError) as caught:
        train_lens(plain(world, tmp_path / "run", dump__cache_dir=str(cache)))
    assert named in str(caught.value)


def test_cache_of_another_layer_is_refused(world, tmp_path):
    with pytest.raises(CacheError, match="model.layer: the cache has 1, this run has 0"):
        train_lens(plain(world, tmp_path / "run", model__layer=0))


def test_missing_cache_names_the_command(world, tmp_path):
    session = plain(world, tmp_path / "run", dump__cache_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="dump.cache_dir.*python -m conlens_jax.dump"):
        train_lens(session)


def test_truncated_shard_is_refused(world, tmp_path):
    cache = world.copy_cache(tmp_path / "cache")
    shard = cache / "train" / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CacheError, match="shard-00002.safetensors: .* bytes instead of"):
        train_lens(plain(world, tmp_path / "run", dump__cache_dir=str(cache)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dump__after": 20, "evaluate__kl_horizon": 15}, "fewer than 14 tokens after"),
        ({"dump__min_position": 20, "warm__before": 15, "lens__text_len": 16}, "warm.before=15"),
        ({"warm__batch_size": 200}, "batch_size=200 is larger than the 192 rows"),
    ],
    ids=["after", "before", "batch"],
)
def test_rows_that_training_cannot_read_are_named(world, tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        train_lens(plain(world, tmp_path / "run", **changes))


@contextlib.contextmanager
def full_disk(at_step: int, monkeypatch):
    """From a checkpoint on no file can grow beyond 50 kB, which a real write meets in the
    background."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Checkpoints.save

    def save_on_a_full_disk(self, step, *args, **kwargs):
        if step >= at_step:
            self.wait()  # the one before it still has room
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        return save(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_on_a_full_disk)
        # The first of many writes to fail ends the event loop that the others report to.
        patch.setattr(sys, "unraisablehook", lambda _: None)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            time.sleep(0.3)


@pytest.fixture
def buried(monkeypatch):
    """Collects what failed writes leave behind, here and not in the middle of a later test."""
    yield
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda _: None)
        gc.collect()


@pytest.mark.usefixtures("buried")
@pytest.mark.parametrize(
    ("at_step", "last_good"), [(6, 3), (WARM_STEPS, WARM_STEPS - CHECKPOINT_EVERY)]
)
def test_full_disk_names_the_last_good_checkpoint(
    world, tmp_path, unwatched, monkeypatch, at_step, last_good
):
    session = plain(world, tmp_path / "run", joint__steps=0)
    with full_disk(at_step, monkeypatch), pytest.raises(TrainingStopped) as caught:
        train_lens(session)
    folder = tmp_path / "run" / "checkpoints"
    assert f"the last good checkpoint is {folder / str(last_good)}." in str(caught.value)
    assert "File too large" in str(caught.value)
    train_lens(session)  # room again
    assert losses(tmp_path / "run") == losses(world.run)[:WARM_STEPS]


def test_full_disk_at_the_very_save(world, tmp_path, unwatched, monkeypatch):
    def no_space(self, step, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", no_space)
    with pytest.raises(TrainingStopped, match="No space left.*no checkpoint was written yet"):
        train_lens(plain(world, tmp_path / "run", joint__steps=0))
