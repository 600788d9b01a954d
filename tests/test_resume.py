"""A run that goes on, after a kill too, has the losses of one that was never stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipeline import (
    CHECKPOINT_EVERY,
    LAST_STEP,
    WARM_STEPS,
    assert_same_arrays,
    child_settings,
    losses,
    open_world,
    quiet_console,
)
from training_runs import plain, saved, unvalidated

from conlens_jax.config import ConfigError, to_json_dict
from conlens_jax.tracking.records import read_metrics
from conlens_jax.training import stage_loop
from conlens_jax.training.checkpoint import all_steps
from conlens_jax.training.loop import train_lens


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        world.run  # noqa: B018 (trained now, so that no test's time is this)
        yield world


@pytest.fixture
def unwatched(monkeypatch):
    monkeypatch.setattr(stage_loop, "validate", unvalidated)


def test_run_goes_on_to_the_same_losses_to_the_last_bit(world, tmp_path, unwatched):
    """As a kill behind the last log line, before its checkpoint, leaves a run and its control."""
    run = world.copy_run(tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / str(LAST_STEP))
    shutil.rmtree(run / "control" / "checkpoints")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 19, "lo')  # torn
    console, stream = quiet_console()
    train_lens(dataclasses.replace(world.changed(run), console=console))
    resumed = f"resumed_from={run / 'checkpoints' / str(LAST_STEP - CHECKPOINT_EVERY)}"
    assert resumed in stream.getvalue()
    assert losses(run) == losses(world.run)
    assert losses(run / "control") == losses(world.run / "control")
    assert_same_arrays(saved(world, run, LAST_STEP), saved(world, world.run, LAST_STEP))
    # The compute of before counts too.
    seconds = [r["train_seconds"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    joint = seconds[WARM_STEPS:]
    assert sorted(joint) == joint


def test_finished_run_is_left_alone(world, tmp_path, unwatched):
    run = world.copy_run(tmp_path / "run")
    files = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != "config.json"}
    config = {"train.log_every": 5, "checkpoint.keep_latest": 7, "evaluate.rows": 5}
    changes = {name.replace(".", "__"): value for name, value in config.items()}
    train_lens(world.changed(run, **changes))  # fields that change no loss may differ
    assert losses(run) == losses(world.run)
    assert {p: p.stat().st_mtime_ns for p in files if p.is_file()} == {
        p: time for p, time in files.items() if p.is_file()
    }


CHILD = """
import json, sys
from pathlib import Path
import jax
for name, value in json.loads(sys.argv[2]).items():
    jax.config.update(name, value)
from conlens_jax.config import from_config_dict
from conlens_jax.training import loop, stage_loop
from conlens_jax.tracking.console import Console
from conlens_jax.training.session import open_session
from conlens_jax.training.validation import Validation, validate
stage_loop.validate = lambda *_: Validation({"kl_at_sampled": 1.0}, "")
config = from_config_dict(json.loads(Path(sys.argv[1]).read_text()))
loop.train_lens(open_session(config, Console()))
"""


@contextlib.contextmanager
def training_process(config_file: Path, log: Path):
    """A training in a process of its own; whatever happens, it is gone afterwards."""
    command = [sys.executable, "-c", CHILD, str(config_file), json.dumps(child_settings())]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_until(condition, process: subprocess.Popen, log: Path, seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the training ended by itself:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"nothing happened:\n{log.read_text()}"
        time.sleep(0.001)


def half_written(folder: Path) -> list[Path]:
    return list(folder.glob("*orbax-checkpoint-tmp*")) if folder.is_dir() else []


def test_killed_run_gives_the_same_losses_to_the_last_bit(world, tmp_path, unwatched):
    """SIGKILL at a random step of the run, during a save."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    session = plain(world, run, checkpoint__every=1)
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(to_json_dict(session.config)))
    checkpoints = run / "checkpoints"
    step = random.Random(time.time_ns()).randint(3, LAST_STEP - 2)

    def is_saving() -> bool:
        return any(int(path.name.split(".")[0]) >= step for path in half_written(checkpoints))

    with training_process(config_file, log) as process:
        while True:
            wait_until(is_saving, process, log)
            process.send_signal(signal.SIGSTOP)  # held still, to be sure that it is in the save
            time.sleep(0.01)
            if is_saving():
                break
            process.send_signal(signal.SIGCONT)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert half_written(checkpoints)
    assert step - 1 <= all_steps(checkpoints)[-1] < LAST_STEP

    train_lens(session)
    assert losses(run) == losses(world.run)
    assert not half_written(checkpoints)
    assert_same_arrays(saved(world, run, LAST_STEP), saved(world, world.run, LAST_STEP))


@pytest.mark.parametrize(
    "changes",
    [
        {"joint.optimizer.learning_rate.start": 0.5, "train.seed": 3},
        {"loss.kl.start": 0.9},
        {"warm.steps": WARM_STEPS + 1},
        {"lens.text_len": 5, "warm.before": 4},
        {"model.layer": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_resume_with_another_config_names_the_fields(world, tmp_path, changes):
    run = world.copy_run(tmp_path / "run")
    session = world.changed(run, **{k.replace(".", "__"): v for k, v in changes.items()})
    with pytest.raises(ConfigError) as caught:
        train_lens(session)
    assert len(caught.value.problems) == len(changes)
    for name, value in changes.items():
        assert any(
            problem.startswith(f"{name} is {value!r}, and was") for problem in caught.value.problems
        )
    assert json.loads((run / "config.json").read_text()) == to_json_dict(world.config)


def test_resume_that_is_not_wanted(world, tmp_path):
    run = world.copy_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="has checkpoints; choose another run_dir"):
        train_lens(world.changed(run, train__resume=False))
