"""Checkpoints: what stays, what comes back, on which mesh, and after a kill."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
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
    Checkpoints,
    all_steps,
    best_step,
    read_metadata,
    restore_params,
)
from conlens_jax.training.checkpoint_storage import CheckpointError, DamagedCheckpoint
from conlens_jax.training.checksums import checksums


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
        assert checkpoints.all_steps() == []
        assert checkpoints.save(3, make_state(3, dtype=jnp.bfloat16), metadata)
        assert checkpoints.all_steps() == [3] and best_step(tmp_path, "validation_loss") is None
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
            return checkpoints.all_steps(), best_step(tmp_path, "validation_loss")

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
    place = lambda *axes: jax.device_put(array, jax.NamedSharding(eight, spec(*axes)))
    saved = {"w": place("fsdp", None), "copies": place()}
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"params": saved}, {})
        other = jax.NamedSharding(two_by_two, spec("tensor", "data"))
        like = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=other)
        restored = checkpoints.restore(1, {"params": dict.fromkeys(saved, like)})[0]["params"]
    for found in restored.values():
        assert found.sharding == other
        assert found.addressable_shards[0].data.shape == (8, 4)
        np.testing.assert_array_equal(found, array)
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
    step = max(checkpoints.all_steps(), default=0) + 1
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
        assert checkpoints.all_steps()[-1] == last
        state, metadata = checkpoints.restore(None, template)
        assert metadata == {"step": last}
        assert_same(state, jax.tree.map(lambda x: x + last, template))
    assert not [path.name for path in tmp_path.iterdir() if "tmp" in path.name]


# --- names, and damage --------------------------------------------------------------------------

STATE = {"params": {"a": jnp.arange(4096.0).reshape(64, 64), "b": jnp.int32(3)}}
NAMES = (
    "a[1]b",
    "a*?",
    "a b=c %20",
    'it\'s "q" & $HOME; <c>',
    "é 日本",
    "~home",
    "-x",
    "a:b#c{d}",
    "a\nb",
    "x" * 200,
)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_that_the_file_system_allows(tmp_path, monkeypatch, name):
    # Were the name a pattern, it would match this one, of another run.
    (tmp_path / "axx" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    folder = tmp_path / name
    with Checkpoints(folder, keep_latest=1, keep_best=0) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE, {"name": name})
        assert_same(checkpoints.restore(None, STATE)[0], STATE)
    assert all_steps(folder) == [2] and read_metadata(folder) == {"name": name}
    assert_same(restore_params(folder, 2, STATE["params"]), STATE["params"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    assert read_metadata("link") == {"name": name}


def test_relative_names_stay_the_same_place_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints", keep_latest=2, keep_best=0) as checkpoints:
        checkpoints.save(1, STATE, {})
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        checkpoints.save(2, STATE, {})
        assert checkpoints.all_steps() == [1, 2]
    assert all_steps(tmp_path / "run" / "checkpoints") == [1, 2]


@pytest.mark.parametrize("folder", ["a\\b", "/gs/bucket/run", "/s3/run"])
def test_names_that_orbax_reads_otherwise_are_refused(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"storage of checkpoints.*symbolic link"):
        Checkpoints(tmp_path / folder, keep_latest=1, keep_best=0)
    assert not any(tmp_path.iterdir())


def test_the_first_checkpoint_is_read_back(tmp_path, monkeypatch):
    from conlens_jax.training import checkpoint_storage

    reads = checkpoint_storage.stored_arrays

    def altered(path, tree, names):
        found = reads(path, tree, names)
        return {**found, "params.a": found["params.a"] + 1}

    monkeypatch.setattr(checkpoint_storage, "stored_arrays", altered)
    with (
        Checkpoints(tmp_path, keep_latest=3, keep_best=0) as checkpoints,
        pytest.raises(CheckpointError, match=r"cannot be read back: params\.a came back different"),
    ):
        checkpoints.save(1, STATE, {})
    # Only the first: a folder that has been read is a folder that can be.
    with Checkpoints(tmp_path, keep_latest=3, keep_best=0) as checkpoints:
        checkpoints.save(2, STATE, {})


def test_a_donated_or_sharded_state_is_compared_too(tmp_path):
    eight = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.NamedSharding(eight, jax.sharding.PartitionSpec("fsdp"))
    array = jax.device_put(jnp.arange(64.0, dtype=jnp.bfloat16).reshape(16, 4), spec)
    with Checkpoints(tmp_path, keep_latest=1, keep_best=0) as checkpoints:
        assert checkpoints.save(1, {"params": {"w": array, "n": jnp.float32(jnp.nan)}}, {})


DAMAGES = [
    ("metadata/metadata", "half", "JSON"),
    ("metadata/metadata", "gone", "metadata"),
    ("metrics/metrics", "half", "metrics/metrics is not whole JSON"),
    ("state/_METADATA", "gone", "_METADATA"),
    ("state/manifest.ocdbt", "empty", r"state/manifest\.ocdbt is"),
    ("values", "gone", r"state/.*d/\w+ is missing"),
    ("values", "half", r"state/.*d/\w+ is cut short"),
]


def _files_of(step: Path, name: str) -> list[Path]:
    return sorted(step.glob("state/**/d/*")) if name == "values" else [step / name]


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    with Checkpoints(folder, keep_latest=3, keep_best=0) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, STATE, {"step": step}, {"validation_loss": 1.0})
    return folder


@pytest.mark.parametrize(("name", "kind", "said"), DAMAGES)
def test_a_damaged_checkpoint_says_which_one_is_whole(
    three_steps, tmp_path, capfd, name, kind, said
):
    folder = Path(shutil.copytree(three_steps, tmp_path / "my run" / "checkpoints"))
    for step in (6, 9):
        for file in _files_of(folder / str(step), name):
            content = b"" if kind == "empty" else file.read_bytes()[: file.stat().st_size // 2]
            file.unlink() if kind == "gone" else file.write_bytes(content)
    capfd.readouterr()
    if name == "metrics/metrics":
        read = lambda: Checkpoints(folder, keep_latest=3, keep_best=0)
    elif name == "metadata/metadata":
        read = lambda: read_metadata(folder)
    else:
        read = lambda: restore_params(folder, None, STATE["params"])
    with pytest.raises(DamagedCheckpoint) as error:
        read()
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err and "never retrieved" not in printed.err
    if name == "metrics/metrics":
        assert error.value.step == 6  # the first that is met
        move = ["mv", str(folder / "6"), str(folder.parent / "damaged-6")]
    else:
        assert error.value.step == 9
        move = ["mv", str(folder / "9"), str(folder.parent / "damaged-9")]
    assert error.value.whole == 3 and "--step=3" in str(error.value)
    problem, _, command = str(error.value).splitlines()
    assert re.search(said, problem), problem
    assert len(problem) < 400 and "tensorstore" not in problem
    # The command does what is said of it.
    assert shlex.split(command) == move
    for step in (6, 9) if name == "metrics/metrics" else (9, 6):
        with pytest.raises(DamagedCheckpoint) as error:
            read()
        subprocess.run(str(error.value).splitlines()[-1], shell=True, check=True)
        assert (folder.parent / f"damaged-{step}").is_dir()
    assert all_steps(folder) == [3]
    with Checkpoints(folder, keep_latest=3, keep_best=0) as checkpoints:
        assert_same(checkpoints.restore(None, STATE)[0], STATE)


def test_a_flipped_bit_among_the_values_is_noticed(tmp_path):
    noise = {"params": {"w": jax.random.normal(jax.random.key(0), (64, 64)), "n": jnp.int8(3)}}
    with Checkpoints(tmp_path, keep_latest=2, keep_best=0) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, noise, {})
    file = max((tmp_path / "2").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(bytes(content))
    with pytest.raises(DamagedCheckpoint, match=r"the values of params\.w are not") as error:
        restore_params(tmp_path, None, noise["params"])
    assert error.value.whole == 1
    half = {"w": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)}
    assert restore_params(tmp_path, 1, half)["w"].dtype == jnp.bfloat16


def test_checksums_are_of_the_place_and_not_of_the_mesh():
    eight = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_, jnp.int32):
        array = jnp.asarray(rng.integers(0, 2**7, (8, 6, 2)), dtype)
        bits = np.asarray(array).view(f"u{array.dtype.itemsize}").astype(np.uint64).ravel()
        expected = int(np.sum(bits * (2 * np.arange(bits.size, dtype=np.uint64) + 1)) % 2**32)
        sharding = jax.NamedSharding(eight, jax.sharding.PartitionSpec("a", "b"))
        found = checksums({"x": array, "y": jax.device_put(array, sharding)})
        assert found == {"x": expected, "y": expected}, dtype


def test_no_whole_one_before_it(tmp_path):
    with Checkpoints(tmp_path, keep_latest=3, keep_best=0) as checkpoints:
        checkpoints.save(1, STATE, {})
    (tmp_path / "1" / "state" / "_METADATA").unlink()
    with pytest.raises(DamagedCheckpoint, match="another run_dir") as error:
        restore_params(tmp_path, 1, STATE["params"])
    assert error.value.whole is None
