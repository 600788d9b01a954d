"""Several processes on one machine: the run of one, and what happens when one of them goes."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
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
from conlens_jax.data import cache
from conlens_jax.data.cache import ActivationCache
from conlens_jax.data.cache_writer import CacheWriter
from conlens_jax.evaluation.run import evaluate_run
from conlens_jax.parallel import preemption, processes
from conlens_jax.parallel.mesh import batch_sharding, make_mesh
from conlens_jax.parallel.preemption import (
    PREEMPTED,
    Preempted,
    leave_together,
    leaving_on_sigterm,
    watching_for_sigterm,
)
from conlens_jax.parallel.processes import ProcessError, local_rows, on_devices, start_processes
from conlens_jax.training import stage_loop
from conlens_jax.training.checkpoint import all_steps
from conlens_jax.training.loop import train_lens
from conlens_jax.training.session import open_caches, training_reference
from conlens_jax.training.validation import Validation


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
        (
            {"coordinator": "node1"},
            r"must be 'host:port' \(port 1 to 65535\), 'auto' or empty, not 'node1'",
        ),
        ({"coordinator": ""}, "go with distributed.coordinator='host:port'"),
        ({"timeout": 0}, "distributed.timeout must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_config_dict({"distributed": {**good, **change}})


def test_processes_that_find_no_cluster():
    with pytest.raises(ProcessError, match="distributed.coordinator='auto': .* did not connect"):
        start_processes(DistributedConfig("auto"))
    start_processes(DistributedConfig())  # alone: nothing to do


# --- what each process reads ---------------------------------------------------------------------


def test_each_process_reads_its_share_of_the_cache_at_start(world, monkeypatch):
    """Two processes, one after the other: the second is told what the first has said."""
    whole, said = world.session.reference, []
    read: dict[tuple[str, int], int] = collections.Counter()
    rows, problem = ActivationCache.rows, cache.shard_problem

    def gathered(value):
        if processes.is_first():
            said.append(value)
            return [value, None]
        return [said.pop(0), value]

    def counting_rows(self, indices):
        read["rows", jax.process_index()] += len(indices)
        return rows(self, indices)

    def counting_problem(folder, shard, with_hash):
        read["verified", jax.process_index()] += shard.rows * with_hash
        return problem(folder, shard, with_hash)

    monkeypatch.setattr(processes, "gathered", gathered)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(ActivationCache, "rows", counting_rows)
    monkeypatch.setattr(cache, "shard_problem", counting_problem)
    for number in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        train, validation = open_caches(world.session)
        reference = training_reference(train)
        np.testing.assert_array_equal(reference.mean_D, whole.mean_D)
        assert reference.scale == whole.scale and reference.n_rows == len(train)
    assert not said
    # Shards of 48 rows: 4 and 2 of them.
    assert [read["rows", number] for number in (0, 1)] == [len(train), 0]
    assert [read["verified", number] for number in (0, 1)] == [96 + 48, 96 + 16]
    assert len(train) + len(validation) == 96 + 48 + 96 + 16


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    def fail():
        raise OSError("disk full")

    others = lambda value: [value, "no such corpus"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "gathered", others)
    with pytest.raises(OSError, match="disk full"):
        processes.together(fail)
    with pytest.raises(ProcessError, match="process 1 failed: no such corpus"):
        processes.together(lambda: 1)
    sums = np.array([1, 1, 2], np.uint32)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda _: sums)
    with pytest.raises(ProcessError, match="process 2 has another config than process 0"):
        processes.check_same("config", b"")


# --- a run of several processes -----------------------------------------------------------------


@pytest.fixture
def quick_children(monkeypatch):
    """Other processes compile as this one does, and no program twice."""
    for name, value in child_settings().items():
        if name != "jax_num_cpu_devices":
            monkeypatch.setenv(name.upper(), str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))


def started(session, folder: Path) -> tuple[list[subprocess.Popen], Path]:
    """several_processes.py in two processes of four devices, and the file of what they say."""
    file = folder / "config.py"
    values = json.dumps(to_json_dict(session.config))
    file.write_text(
        "import json\n"
        "from conlens_jax.config import from_config_dict, to_config_dict\n"
        f"get_config = lambda: to_config_dict(from_config_dict(json.loads({values!r})))\n",
        encoding="utf-8",
    )
    said = folder / "said.txt"
    with said.open("wb") as stream:
        running = launch.start(
            ["several_processes", f"--config={file}"], 2, 4, stdout=stream, stderr=stream
        )
    return running, said


def wait_for_step(step: int, checkpoints: Path, running, said: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not any(saved >= step for saved in all_steps(checkpoints)):
        assert all(process.poll() is None for process in running), said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.01)


def interrupted_dump(world, folder: Path) -> None:
    """What a dump leaves that was killed behind its first shard."""
    whole = ActivationCache.open(world.cache / "train")
    shard = whole.metadata.shards[0]
    metadata = dataclasses.replace(whole.metadata, n_rows=0, shards=())
    writer = CacheWriter(folder / "train", metadata, shard.rows)
    writer.append(whole.rows(range(shard.rows)), [shard.cursor] * shard.rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}


def warm_run(world, folder: Path) -> Path:
    """The world's run as the warm start left it, for a run with other settings behind that; returns
    its checkpoints."""
    checkpoints = world.copy_run(folder) / "checkpoints"
    (folder / "config.json").unlink()
    shutil.rmtree(folder / "control")
    for step in all_steps(checkpoints):
        if step != WARM_STEPS:
            shutil.rmtree(checkpoints / str(step))
    return checkpoints


def test_two_processes_give_what_one_gives_are_stopped_lose_one_and_go_on_as_one(
    world, tmp_path, quick_children, monkeypatch
):
    """Two processes of 4 devices finish an interrupted dump and evaluate a lens: the cache and the
    report of one process of 8. In the joint stage SIGTERM to one of them saves and ends both with
    75; the same command goes on; a killed process ends the other within seconds; one process
    finishes. The losses are those of a run of one process."""
    run, quiet = tmp_path / "run", {"control__enabled": False, "train__n_verbose_samples": 0}
    often = {"checkpoint__every": 1, "train__validate_every": 1}
    together = world.changed(run, dump__cache_dir=str(tmp_path / "cache"), **quiet, **often)
    interrupted_dump(world, tmp_path / "cache")
    checkpoints = warm_run(world, run)
    running, said = started(together, tmp_path)
    try:
        wait_for_step(WARM_STEPS + 1, checkpoints, running, said)
        running[1].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=300) for process in running]
        assert codes == [PREEMPTED, PREEMPTED] == [75, 75], said.read_text()
        (stopped_at,) = all_steps(checkpoints)[-1:]
        assert stopped_at < LAST_STEP and f"saved after step {stopped_at}" in said.read_text()
        assert said.read_text().count("model      id=") == 1  # one of them speaks
        assert "resumed_after=48" in said.read_text()

        running, said = started(together, tmp_path)
        wait_for_step(stopped_at + 1, checkpoints, running, said)
        running[1].kill()
        killed = time.monotonic()
        assert running[0].wait(timeout=300) != 0, said.read_text()
        assert time.monotonic() - killed < 200
        # Ours, where the connection breaks; where it only falls silent, JAX's heartbeats end the
        # process with their own (jax.distributed has no public hook before that), and where half a
        # message arrived, its collectives do (Gloo aborts).
        ends = "another process died", "another task died", "collective mismatch"
        assert any(end in said.read_text() for end in ends), said.read_text()
        assert f"resumed_from={checkpoints / str(stopped_at)}" in said.read_text()
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert contents(tmp_path / "cache") == contents(world.cache)
    warm_run(world, tmp_path / "alone")
    evaluate_run(world.changed(tmp_path / "alone", **quiet, **often), tmp_path / "alone")
    assert_same_evaluation(run, tmp_path / "alone")

    assert all_steps(checkpoints)[-1] < LAST_STEP
    monkeypatch.setattr(stage_loop, "validate", lambda *_: Validation({}, ""))
    train_lens(together)
    found, expected = losses(run), losses(world.run)
    assert [step[:2] for step in found] == [step[:2] for step in expected]
    # A sampled token that is another one changes a loss by far more.
    np.testing.assert_allclose([step[2] for step in found], [step[2] for step in expected], 1e-5)


def assert_same_evaluation(run: Path, other: Path) -> None:
    """Every metric to 1e-5, and every text of the reports, greedy and sampled."""
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (run, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (value if value is None else pytest.approx(value, rel=1e-5)), name
    pages = [(folder / "report.html").read_text() for folder in (run, other)]
    before_config = [page[: page.index('<section id="config">')] for page in pages]
    assert before_config[0] == before_config[1]


# --- SIGTERM ------------------------------------------------------------------------------------


def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(world, tmp_path, monkeypatch):
    """In the joint stage, between two checkpoints; the warm start is the world's."""
    quiet = {"control__enabled": False, "train__n_verbose_samples": 0}
    monkeypatch.setattr(stage_loop, "validate", lambda *_: Validation({}, ""))
    session, read, calls = world.changed(tmp_path / "run", **quiet), stage_loop.read_batch, []
    checkpoints = warm_run(world, tmp_path / "run")

    def read_and_be_stopped(*arguments):
        calls.append(arguments)
        # Two batches are read ahead, and one for compiling.
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(*arguments)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stage_loop, "read_batch", read_and_be_stopped)
    with pytest.raises(Preempted, match="saved after step .* the same command continues"):
        train_lens(session)
    assert signal.getsignal(signal.SIGTERM) is before
    stopped_at = all_steps(checkpoints)[-1]
    assert WARM_STEPS < stopped_at < LAST_STEP
    monkeypatch.setattr(stage_loop, "read_batch", read)
    train_lens(session)
    assert losses(tmp_path / "run") == losses(world.run)


def test_sigterm_behind_the_last_step_of_a_stage_is_not_lost(world, tmp_path, monkeypatch):
    """While the last step is validated nobody asks any more; the next stage must not begin."""
    quiet = {"train__n_verbose_samples": 0}
    session, checkpoints = (
        world.changed(tmp_path / "run", **quiet),
        warm_run(world, tmp_path / "run"),
    )

    def be_stopped(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return Validation({}, "")

    with monkeypatch.context() as patch:
        patch.setattr(stage_loop, "validate", be_stopped)
        with pytest.raises(Preempted, match="the joint stage is over and saved"):
            train_lens(session)
    assert all_steps(checkpoints)[-1] == LAST_STEP
    assert not (tmp_path / "run" / "control").exists()
    monkeypatch.setattr(stage_loop, "validate", lambda *_: Validation({}, ""))
    train_lens(session)
    assert losses(tmp_path / "run" / "control") == losses(world.run / "control")


def test_sigterm_where_nobody_watches_leaves_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM: the same command goes on"), leaving_on_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except Exception:  # such as that of a tracker, which forgives everything
            pytest.fail("the signal was swallowed")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb the leaving
    assert signal.getsignal(signal.SIGTERM) is before


def test_several_processes_ask_with_numbers_that_rise(monkeypatch):
    """Over all stages: a number that was passed is never reached, and the signal is lost."""
    asked, stop_at = [], [0]

    def reached(number):
        asked.append(number)
        return number == stop_at[0]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", reached)
    for _ in range(2):
        with watching_for_sigterm("saved") as stops:
            assert not stops() and not stops()
    leave_together("evaluates again")
    assert asked == list(range(asked[0], asked[0] + 7))
    stop_at[0] = asked[-1] + 2  # behind the last step
    with (
        pytest.raises(Preempted, match="SIGTERM: all is saved"),
        watching_for_sigterm("all is saved") as stops,
    ):
        assert not stops()
    stop_at[0] = asked[-1] + 1
    with pytest.raises(Preempted, match="SIGTERM: evaluates again"):
        leave_together("evaluates again")


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
