"""Checkpoints: what stays, what comes back, on which mesh, and after a kill."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conlens_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    all_steps,
    read_metadata,
    restore_params,
)


class State(flax.struct.PyTreeNode):
    params: dict
    opt_state: optax.OptState
    step: jax.Array


def make_state(value: float, width: int = 8, dtype=jnp.float32) -> State:
    params = {
        "decoder": {"base": {"w": jnp.full((4, width), value, dtype)}},
        "encoder": {"projection": {"kernel": jnp.full((width, width), value + 0.5, dtype)}},
    }
    adam = optax.scale_by_adam()
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(value, x.dtype), adam.init(params))
    return State(params, opt_state, jnp.int32(value))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def abstract(state):
    return jax.eval_shape(lambda: state)


def test_state_and_metadata_come_back_in_a_new_manager(tmp_path):
    metadata = {"stage": "joint", "data": {"epoch": 1, "row": 7}, "config": {"run_dir": "é"}}
    with Checkpoints(tmp_path, keep_latest=2, keep_best=0) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.save(3, make_state(3, dtype=jnp.bfloat16), metadata)
        assert checkpoints.latest_step() == 3 and checkpoints.best_step() is None
    with Checkpoints(tmp_path, keep_latest=2, keep_best=0) as checkpoints:
        template = abstract(make_state(0, dtype=jnp.bfloat16))
        state, read = checkpoints.restore(None, template)
    assert isinstance(state, State)
    assert_same(state, make_state(3, dtype=jnp.bfloat16))
    assert read == metadata == read_metadata(tmp_path) == read_metadata(tmp_path, 3)


def test_newest_best_and_named_steps_stay_across_a_restart(tmp_path):
    losses = {1: 5.0, 2: 0.1, 3: 4.0, 4: float("nan"), 5: 3.0, 6: 2.0, 7: None, 8: 9.0}

    def save(steps):
        with Checkpoints(tmp_path, keep_latest=2, keep_best=2, keep_steps=(3, 99)) as checkpoints:
            for step in steps:
                loss = losses[step]
                metrics = None if loss is None else {"validation_loss": loss, "other": -loss}
                checkpoints.save(step, make_state(step), {}, metrics)
            return checkpoints.all_steps(), checkpoints.best_step()

    # Newest 3 and 4, best 2 and 3.
    assert save([1, 2, 3, 4]) == ([2, 3, 4], 2)
    # Newest 7 and 8, best 2 and 6, named 3. NaN and a missing metric (4, 7) are not good.
    assert save([5, 6, 7, 8]) == ([2, 3, 6, 7, 8], 2)
    assert all_steps(tmp_path) == [2, 3, 6, 7, 8]


def test_an_existing_step_stays_unless_forced(tmp_path):
    with Checkpoints(tmp_path, keep_latest=2, keep_best=1) as checkpoints:
        assert checkpoints.save(5, make_state(5), {"try": 1})
        assert not checkpoints.save(5, make_state(6), {"try": 2})
        assert read_metadata(tmp_path, 5) == {"try": 1}
        assert checkpoints.save(5, make_state(7), {"try": 3}, force=True)
        state, metadata = checkpoints.restore(5, make_state(0))
    assert metadata == {"try": 3}
    assert_same(state, make_state(7))


def test_donating_the_arrays_right_after_save_does_not_change_the_checkpoint(tmp_path):
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = update(jnp.zeros((512, 1024)))
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"params": {"x": x}}, {})
        for _ in range(20):
            x = update(x)
        state, _ = checkpoints.restore(1, {"params": {"x": x}})
    np.testing.assert_array_equal(state["params"]["x"], 1)
    np.testing.assert_array_equal(x, 21)


def test_saved_on_eight_devices_restores_to_another_sharding_and_to_one(tmp_path):
    auto = jax.sharding.AxisType.Auto
    spec = jax.sharding.PartitionSpec
    eight = jax.make_mesh((8,), ("fsdp",), axis_types=(auto,))
    two_by_two = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(auto, auto), devices=jax.devices()[:4]
    )
    array = jnp.arange(16.0 * 8).reshape(16, 8)
    saved = jax.device_put(array, jax.NamedSharding(eight, spec("fsdp", None)))
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"params": {"w": saved}}, {})
        other = jax.NamedSharding(two_by_two, spec("tensor", "data"))
        template = {"params": {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=other)}}
        restored = checkpoints.restore(1, template)[0]["params"]["w"]
    assert restored.sharding == other
    assert restored.addressable_shards[0].data.shape == (8, 4)
    np.testing.assert_array_equal(restored, array)
    alone = restore_params(tmp_path, 1, {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32)})["w"]
    assert len(alone.sharding.device_set) == 1
    np.testing.assert_array_equal(alone, array)


def test_params_alone_need_no_optimizer_and_may_be_a_part_in_another_dtype(tmp_path):
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(2, make_state(2), {})
    params = restore_params(tmp_path, None, abstract(make_state(0)).params)
    assert_same(params, make_state(2).params)
    part = {"encoder": {"projection": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)}}}
    restored = restore_params(tmp_path, 2, part)
    assert_same(restored, {"encoder": make_state(2, dtype=jnp.bfloat16).params["encoder"]})


def test_a_failed_save_does_not_hide_the_error_that_ends_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise ValueError("no space left for the last save")

    monkeypatch.setattr(Checkpoints, "close", full)
    with pytest.raises(KeyError), Checkpoints(tmp_path, keep_latest=1, keep_best=0):
        raise KeyError
    with (
        pytest.raises(ValueError, match="no space"),
        Checkpoints(tmp_path, keep_latest=1, keep_best=0),
    ):
        pass


def test_missing_checkpoints_are_said_clearly(tmp_path):
    for read in (read_metadata, lambda folder: restore_params(folder, None, {})):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere.*init_from"):
            read(tmp_path / "nowhere")
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        with pytest.raises(CheckpointError, match="run_dir"):
            checkpoints.restore(None, make_state(0))
        checkpoints.save(4, make_state(4), {})
        with pytest.raises(CheckpointError, match=r"step 9 .*it has 4"):
            checkpoints.restore(9, make_state(0))


def test_another_configuration_is_refused_with_every_difference(tmp_path):
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        other = make_state(0, width=6)
        other.params["decoder"]["soft_prompt"] = {"vectors": jnp.zeros((2, 6))}
        del other.params["encoder"]["projection"]
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(1, other)
        for part in (
            "params.decoder.base.w has shape (4, 8), not (4, 6)",
            "params.decoder.soft_prompt.vectors is not in the checkpoint",
            "params.encoder.projection.kernel is only in the checkpoint",
            "train.init_from",
            "run_dir",
        ):
            assert part in str(error.value)
        with pytest.raises(CheckpointError, match="dtype float32, not bfloat16"):
            checkpoints.restore(1, make_state(0, dtype=jnp.bfloat16))
    with pytest.raises(CheckpointError, match=r"params\.decoder\.soft_prompt"):
        restore_params(tmp_path, 1, {"decoder": other.params["decoder"]})


# Saves as fast as it can, each checkpoint of several files that all carry the step.
WRITER = """
import sys
import jax.numpy as jnp
from conlens_jax.training.checkpoint import Checkpoints

with Checkpoints(sys.argv[1], keep_latest=2, keep_best=1) as checkpoints:
    step = (checkpoints.latest_step() or 0) + 1
    while True:
        state = {"params": {str(i): jnp.full((64, 64), step) for i in range(8)}}
        checkpoints.save(step, state, {"step": step}, {"validation_loss": 1.0 / step})
        print(step, flush=True)
        step += 1
"""


def test_sigkill_leaves_whole_checkpoints_and_the_next_run_cleans_up(tmp_path):
    template = {"params": {str(i): jnp.zeros((64, 64), jnp.int32) for i in range(8)}}
    rng = random.Random(0)
    last = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            text=True,
        )
        with process:
            for _ in range(2):
                started = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.3))
            os.kill(process.pid, signal.SIGKILL)
        # The save of one step starts only after the one before is on disk.
        assert all_steps(tmp_path)[-1] >= started - 1 > last
        last = all_steps(tmp_path)[-1]
        state = restore_params(tmp_path, None, template["params"])
        assert {int(v) for leaf in state.values() for v in np.unique(leaf)} == {last}
        assert read_metadata(tmp_path) == {"step": last}
    (tmp_path / f"{last + 99}.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, keep_latest=2, keep_best=1) as checkpoints:
        assert checkpoints.latest_step() == last
        state, metadata = checkpoints.restore(None, template)
        assert metadata == {"step": last}
        assert_same(state, jax.tree.map(lambda x: x + last, template))
    assert not [path.name for path in tmp_path.iterdir() if "tmp" in path.name]
