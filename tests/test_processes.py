"""Several processes on one machine: the run of one, and what happens when one of them goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from pipeline import LAST_STEP, WARM_STEPS, child_settings, losses, open_world

from conlens_jax import launch
from conlens_jax.config import (
    ConfigError,
    DistributedConfig,
    MeshConfig,
    from_config_dict,
    to_json_dict,
)
from conlens_jax.parallel.mesh import batch_sharding, make_mesh
from conlens_jax.parallel.preemption import PREEMPTED, Preempted
from conlens_jax.parallel.processes import ProcessError, local_rows, on_devices, start_processes
from conlens_jax.training import loop
from conlens_jax.training.checkpoint import all_steps
from conlens_jax.training.loop import train_lens
from conlens_jax.training.validation import Validation

STEPS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


# --- each process's part ------------------------------------------------------------------------


def test_a_process_has_the_rows_of_its_own_devices():
    """Devices of another process are those whose index is not in the map."""

    class HalfOfTheDevices:
        def __init__(self, sharding, first: int):
            self.sharding, self.first = sharding, first

        def addressable_devices_indices_map(self, shape):
            whole = self.sharding.addressable_devices_indices_map(shape)
            here = jax.devices()[self.first : self.first + 4]
            return {device: index for device, index in whole.items() if device in here}

    for mesh, first_half in (
        ({"data": 8}, np.arange(8)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, np.arange(8)),
        ({"data": 1, "tensor": 8}, np.arange(16)),  # both need all rows
    ):
        sharding = batch_sharding(make_mesh(MeshConfig(**mesh)))
        halves = [local_rows(HalfOfTheDevices(sharding, first), 16) for first in (0, 4)]
        np.testing.assert_array_equal(halves[0], first_half)
        np.testing.assert_array_equal(np.union1d(*halves), np.arange(16))
        np.testing.assert_array_equal(local_rows(sharding, 16), np.arange(16))
        rows = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
        np.testing.assert_array_equal(on_devices(rows, sharding, 16), rows)


def test_settings_of_processes():
    good = {"coordinator": "node1:1234", "num_processes": 2, "process_id": 1}
    assert from_config_dict({"distributed": good}).distributed.process_id == 1
    for change, message in (
        ({"process_id": 2}, "distributed.process_id=2 must be 0 … num_processes − 1"),
        ({"coordinator": "node1"}, "must be 'host:port', 'auto' or empty, not 'node1'"),
        ({"coordinator": ""}, "go with distributed.coordinator='host:port'"),
        ({"timeout": 0}, "distributed.timeout must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_config_dict({"distributed": {**good, **change}})


def test_processes_that_find_no_cluster():
    with pytest.raises(ProcessError, match="distributed.coordinator='auto': .* did not meet"):
        start_processes(DistributedConfig("auto"))
    start_processes(DistributedConfig())  # alone: nothing to do


# --- a run of several processes -----------------------------------------------------------------


@pytest.fixture
def quick_children(monkeypatch):
    """Other processes compile as this one does, and no program twice."""
    for name, value in child_settings().items():
        if name != "jax_num_cpu_devices":
            monkeypatch.setenv(name.upper(), str(value))


def started(setting, folder: Path) -> tuple[list[subprocess.Popen], Path]:
    """``train`` in two processes with four devices each, and the file of what they say."""
    file = folder / "config.py"
    values = json.dumps(to_json_dict(setting.config))
    file.write_text(
        "import json\n"
        "from conlens_jax.config import from_config_dict, to_config_dict\n"
        f"get_config = lambda: to_config_dict(from_config_dict(json.loads({values!r})))\n",
        encoding="utf-8",
    )
    said = folder / "said.txt"
    with said.open("wb") as stream:
        running = launch.start(
            ["conlens_jax.train", f"--config={file}"], 2, 4, stdout=stream, stderr=stream
        )
    return running, said


def wait_for_step(step: int, checkpoints: Path, running, said: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not any(saved >= step for saved in all_steps(checkpoints)):
        assert all(process.poll() is None for process in running), said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.01)


def test_two_processes_are_stopped_lose_one_and_go_on_as_one(
    world, tmp_path, quick_children, monkeypatch
):
    """Two processes of 4 devices: SIGTERM to one of them saves and ends both with 75; the same
    command goes on; a killed process ends the other within seconds; one process of 8 devices
    finishes. The losses are those of a run of one process."""
    settings = {
        "warm__steps": STEPS,
        "joint__steps": 0,
        "control__enabled": False,
        "checkpoint__every": 1,
        "train__validate_every": 1000,
        "train__n_verbose_samples": 0,
    }
    monkeypatch.setattr(loop, "validate", lambda *_: Validation({}, ""))
    alone, run = world.changed(tmp_path / "alone", **settings), tmp_path / "run"
    together, checkpoints = world.changed(run, **settings), run / "checkpoints"
    train_lens(alone)
    running, said = started(together, tmp_path)
    try:
        wait_for_step(2, checkpoints, running, said)
        running[1].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=300) for process in running]
        assert codes == [PREEMPTED, PREEMPTED] == [75, 75], said.read_text()
        (stopped_at,) = all_steps(checkpoints)[-1:]
        assert stopped_at < STEPS and f"saved behind step {stopped_at}" in said.read_text()
        assert said.read_text().count("model      id=") == 1  # one of them speaks

        running, said = started(together, tmp_path)
        wait_for_step(stopped_at + 2, checkpoints, running, said)
        running[1].kill()
        killed = time.monotonic()
        assert running[0].wait(timeout=300) != 0, said.read_text()
        assert time.monotonic() - killed < 200
        assert "another process died" in said.read_text(), said.read_text()
        assert f"resumed_from={checkpoints / str(stopped_at)}" in said.read_text()
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert all_steps(checkpoints)[-1] < STEPS
    train_lens(together)
    steps = [step for _, step, _ in losses(run)]
    assert steps == list(range(1, STEPS + 1))
    np.testing.assert_allclose(
        [loss for *_, loss in losses(run)], [loss for *_, loss in losses(tmp_path / "alone")], 1e-5
    )


# --- SIGTERM ------------------------------------------------------------------------------------


def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(world, tmp_path, monkeypatch):
    """In the joint stage, between two checkpoints."""
    quiet = {"control__enabled": False, "train__n_verbose_samples": 0}
    monkeypatch.setattr(loop, "validate", lambda *_: Validation({}, ""))
    setting, read, calls = world.changed(tmp_path / "run", **quiet), loop.read_batch, []

    def read_and_be_stopped(*arguments):
        calls.append(arguments)
        # Two batches are read ahead, and one for compiling.
        if len(calls) == WARM_STEPS + 1 + 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(*arguments)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "read_batch", read_and_be_stopped)
    with pytest.raises(Preempted, match="saved behind step .* the same command goes on"):
        train_lens(setting)
    assert signal.getsignal(signal.SIGTERM) is before
    stopped_at = all_steps(tmp_path / "run" / "checkpoints")[-1]
    assert WARM_STEPS < stopped_at < LAST_STEP
    monkeypatch.setattr(loop, "read_batch", read)
    train_lens(setting)
    assert losses(tmp_path / "run") == losses(world.run)


# --- the launcher -------------------------------------------------------------------------------


def python(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code])


def test_launcher_ends_the_others_and_gives_the_first_failure():
    sleeping, failing = python("import time; time.sleep(100)"), python("raise SystemExit(7)")
    assert launch.wait([sleeping, failing], grace=0.2) == 7
    assert sleeping.returncode == -signal.SIGKILL
    assert launch.wait([python("pass"), python("pass")], grace=5) == 0


def test_launcher_reads_its_flags_and_the_command():
    flags, command = launch.parse(["--processes=3", "--", "conlens_jax.train", "--config=a.py"])
    assert (flags.processes, flags.devices) == (3, 4)
    assert command == ["conlens_jax.train", "--config=a.py"]
    for arguments in ([], ["--"], ["--processes=0", "--", "x"]):
        with pytest.raises(SystemExit):
            launch.parse(arguments)
