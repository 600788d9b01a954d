"""Training runs: what they leave behind, and that nothing short of a new config changes a loss."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from pipeline import (
    CHECKPOINT_EVERY,
    CONTROL_STEPS,
    JOINT_STEPS,
    LAST_STEP,
    WARM_STEPS,
    assert_same_arrays,
    child_settings,
    losses,
    open_world,
    quiet_console,
)

from conlens_jax.config import ConfigError, to_json_dict, with_changes
from conlens_jax.data.batches import read_groups
from conlens_jax.data.cache_metadata import CacheError
from conlens_jax.lens.objective import warm_loss
from conlens_jax.lens.spec import init_lens
from conlens_jax.models.model import load_model
from conlens_jax.tracking.records import read_metrics
from conlens_jax.training import loop, stage_loop
from conlens_jax.training.checkpoint import Checkpoints, all_steps, read_metadata
from conlens_jax.training.checkpoint_storage import CheckpointError
from conlens_jax.training.loop import train_lens
from conlens_jax.training.run_folder import load_lens
from conlens_jax.training.session import (
    Session,
    open_caches,
    open_session,
    training_reference,
)
from conlens_jax.training.stopped import TrainingStopped
from conlens_jax.training.validation import Validation, validate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        world.run  # noqa: B018 (trained now, so that no test's time is this)
        yield world


@pytest.fixture(autouse=True)
def _no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def unwatched(monkeypatch):
    """Leaves validation out: it takes seconds to compile and changes no loss."""
    score = Validation({"kl_at_sampled": 1.0})
    monkeypatch.setattr(stage_loop, "validate", lambda run, trainable, frozen: score)


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


# --- one whole run ------------------------------------------------------------------------------


def test_smoke_training_leaves_a_whole_run(world):
    run = world.run
    config = json.loads((run / "config.json").read_text())
    assert config == to_json_dict(world.config)
    expected = [("warm", step) for step in range(1, WARM_STEPS + 1)]
    expected += [("joint", step) for step in range(WARM_STEPS + 1, LAST_STEP + 1)]
    assert [(stage, step) for stage, step, _ in losses(run)] == expected
    control = [("control", WARM_STEPS + 1 + step) for step in range(CONTROL_STEPS)]
    assert [(stage, step) for stage, step, _ in losses(run / "control")] == control
    assert all(math.isfinite(loss) for _, _, loss in losses(run) + losses(run / "control"))
    assert all_steps(run / "checkpoints") == [
        WARM_STEPS,
        LAST_STEP - CHECKPOINT_EVERY,
        LAST_STEP,
    ]
    assert all_steps(run / "control" / "checkpoints")[-1] == WARM_STEPS + CONTROL_STEPS
    assert not (run / "wandb").exists()


def test_warm_start_learns(world):
    records = [r for r in read_metrics(world.run / "metrics.jsonl") if r["stage"] == "warm"]
    # The write loss moves less in so few steps than it differs between rows.
    values = [record["encoder_error"] for record in records if "encoder_error" in record]
    assert np.mean(values[-4:]) < 0.8 * np.mean(values[:4])


def test_records_hold_every_term_the_schedules_and_the_compute(world):
    records = [r for r in read_metrics(world.run / "metrics.jsonl") if "loss" in r]
    joint = [record for record in records if record["stage"] == "joint"]
    for record in joint:
        total = sum(record[f"weight_{name}"] * record[name] for name in ("lm", "kl", "mse"))
        assert record["loss"] == pytest.approx(total, rel=1e-4)
        assert record["tau"] == 1.0 and record["bad_steps"] == 0 and record["grad_norm"] > 0
    # The reference of L_LM is the decoder as the warm start left it.
    assert abs(joint[0]["lm"]) < 1e-5 < joint[-1]["lm"]
    rates = [record["learning_rate"] for record in records if record["stage"] == "warm"]
    assert rates[0] == pytest.approx(1e-2) and sorted(rates, reverse=True) == rates
    for stage in ("warm", "joint"):
        seconds = [r["train_seconds"] for r in records if r["stage"] == stage]
        assert seconds[0] > 0 and sorted(seconds) == seconds


def test_validation_is_at_its_steps_and_at_the_end_of_a_stage(world):
    records = read_metrics(world.run / "metrics.jsonl")
    scored = {r["step"]: r for r in records if "validation_kl_at_sampled" in r}
    assert list(scored) == [6, WARM_STEPS, LAST_STEP]
    for name in ("fve_nrm_greedy", "fve_nrm_sampled", "fve_nrm_shuffle", "kl_frac_greedy"):
        assert all(record[f"validation_{name}"] < 1 for record in scored.values())
    for record in scored.values():
        assert abs(record["validation_kl_floor"]) < 1e-4
        assert 0 <= record["validation_repeat_4gram"] <= 1
    # The encoder as the warm start left it reads beside the joint stage's, not beside itself.
    assert [step for step in scored if "validation_gap_frozen" in scored[step]] == [LAST_STEP]
    assert scored[LAST_STEP]["validation_gap_frozen"] != 0


def test_samples_and_histograms_lie_beside_the_metrics(world):
    samples = read_metrics(world.run / "samples.jsonl")
    assert [(r["stage"], r["step"]) for r in samples] == [("warm", WARM_STEPS)] * 2 + [
        ("joint", LAST_STEP)
    ] * 2
    assert all(record["explanation"] and record["kl"] >= 0 for record in samples)
    assert {len(record["tokens"]) for record in samples} == {world.config.lens.text_len}
    assert all(isinstance(record["reads_back"], bool) for record in samples)
    scored = {r["step"]: r for r in read_metrics(world.run / "metrics.jsonl")}
    for record in read_metrics(world.run / "histograms.jsonl"):
        found = record["kl_at_sampled"]
        rows = world.config.train.validation_rows
        assert sum(found["counts"]) == sum(record["cos_shuffle"]["counts"]) == rows
        # The mean lies within half a bin of what the bins' middles say.
        middles = np.convolve(found["edges"], [0.5, 0.5], "valid")
        mean = np.dot(found["counts"], middles) / rows
        half_bin = (found["edges"][1] - found["edges"][0]) / 2
        score = scored[record["step"]]["validation_kl_at_sampled"]
        assert abs(mean - score) <= half_bin + 1e-6
        assert 0 < sum(record["token_shares"].values()) <= 1 + 1e-9


def test_console_shows_parts_samples_and_tokens(world):
    printed = world.stream.getvalue()
    assert "decoder projection" in printed and "total trained" in printed
    assert f"samples at step {LAST_STEP}" in printed and "M predicts" in printed
    assert printed.count("seconds_to_first_step=") >= 3  # warm start, joint stage, control
    assert "common=" in printed and "the:" in printed


def test_original_model_stays_as_it_was(world):
    assert_same_arrays(world.session.model.params, load_model(world.session.model.folder).params)
    _, frozen = lens_template(world)
    warm, joint = saved(world, world.run, WARM_STEPS), saved(world, world.run, LAST_STEP)
    kernels = [tree["decoder"]["base"]["embedding"] for tree in (frozen_base(frozen), warm, joint)]
    for before, after in zip(kernels, kernels[1:], strict=False):
        assert np.abs(np.asarray(before) - np.asarray(after)).max() > 1e-4


def frozen_base(frozen):
    return {"decoder": {"base": frozen["original"]}}


def test_control_begins_where_the_warm_start_ended(world):
    """Its first loss is that of the warm checkpoint on the joint stage's first batch."""
    session = world.session
    train, _ = open_caches(session)
    stage = loop.Stage(
        "control", CONTROL_STEPS, 16, session.config.control.optimizer, first_step=WARM_STEPS
    )
    run = loop.Run(session, world.run, train, None, None, None, None)
    groups_nk = read_groups(train, stage.rows_per_document)
    batch = stage_loop.StageLoop(run, stage, None, None, None, groups_nk, 0.0)._read(0)
    compute = jax.jit(lambda *args: warm_loss(*args, objective=session.objective)[0])
    _, frozen = lens_template(world)
    expected = float(compute(saved(world, world.run, WARM_STEPS), frozen, batch))
    assert losses(world.run / "control")[0][2] == pytest.approx(expected, rel=1e-5)


def test_control_without_steps_is_paid_by_the_joint_stage(world):
    session = world.changed(world.run, control__steps=0)
    run = loop.Run(session, world.run, None, None, None, None, None)
    config = session.config
    warm = loop.Stage("warm", WARM_STEPS, 16, config.warm.optimizer)
    joint = loop.Stage("joint", JOINT_STEPS, 16, config.joint.optimizer, first_step=WARM_STEPS)
    warm_seconds, joint_seconds = (
        read_metadata(world.run / "checkpoints", step)["train_seconds"]
        for step in (WARM_STEPS, LAST_STEP)
    )
    control = loop._control_stage(run, warm, joint)
    assert control.steps == max(round(joint_seconds / (warm_seconds / WARM_STEPS)), 1)
    assert control.first_step == WARM_STEPS and control.supervised


def test_sharded_weights_give_the_same_losses(world, tmp_path, unwatched):
    mesh = {"mesh.data": 4, "mesh.fsdp": 2, "joint.steps": 0, "control.enabled": False}
    config = with_changes(world.config, {**mesh, "run_dir": str(tmp_path / "run")})
    session = open_session(config, quiet_console()[0])
    run = train_lens(session)
    for (*here, loss), (*there, expected) in zip(losses(run), losses(world.run), strict=False):
        assert here == there and loss == pytest.approx(expected, rel=1e-3)
    assert len(losses(run)) == WARM_STEPS
    template = loop.placed(lens_template(world)[0], session)
    restored = load_lens(run, template)["decoder"]["base"]["embedding"]
    assert restored.addressable_shards[0].data.shape == (320, 8)


def test_a_lens_that_does_not_see_its_activation_is_called_so(world):
    """A decoder whose slot is always the same writes texts that fit any row."""
    trainable, frozen = lens_template(world)
    trainable = load_lens(world.run, trainable)
    session = world.session
    (train, validation), reference = session.caches, session.reference
    run = loop.Run(session, world.run, train, validation, reference, session.measurer(), None)
    projection = jax.tree.map(jax.numpy.zeros_like, trainable["decoder"]["projection"])
    blind = {**trainable, "decoder": {**trainable["decoder"], "projection": projection}}
    assert "does not depend on the activation" in validate(run, blind, frozen).warning


def test_only_a_joint_stage_warns_of_its_text(world, tmp_path, monkeypatch):
    """The warm start and its control begin with such texts."""
    found = Validation({"kl_at_sampled": 1.0}, "", warning="collapsed")
    monkeypatch.setattr(stage_loop, "validate", lambda *_: found)
    run = world.copy_run(tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / str(LAST_STEP))
    shutil.rmtree(run / "control" / "checkpoints")
    console, stream = quiet_console()
    train_lens(dataclasses.replace(world.changed(run), console=console))
    warned = [line for line in stream.getvalue().splitlines() if "warning=collapsed" in line]
    assert len(warned) == 1 and f"joint      step={LAST_STEP}" in warned[0]


# --- checkpoints --------------------------------------------------------------------------------


def test_newest_best_warm_and_final_checkpoints_stay(world, tmp_path, monkeypatch):
    # Validations at warm steps 2, 4, …, 12, then joint steps 14, 16, 18; 14 is the best joint one,
    # and the better ones of the warm start do not count.
    scores = iter([0.01] * 6 + [0.2, 0.5, 0.4])
    monkeypatch.setattr(
        stage_loop, "validate", lambda *_: Validation({"kl_at_sampled": next(scores)}, "")
    )
    every = {"train__validate_every": 2, "checkpoint__every": 2}
    session = plain(world, tmp_path / "run", checkpoint__keep_latest=1, **every)
    folder = train_lens(session) / "checkpoints"
    assert all_steps(folder) == [WARM_STEPS, WARM_STEPS + 2, LAST_STEP]
    assert {path.name for path in folder.iterdir()} == {"12", "14", "18"}
    assert read_metadata(folder, WARM_STEPS)["stage"] == "warm"
    metadata = read_metadata(folder, LAST_STEP)
    assert metadata["stage"] == "joint" and metadata["step"] == LAST_STEP
    assert metadata["weights_hash"] == world.session.model.weights_hash
    assert metadata["config"] == to_json_dict(session.config)
    # Nothing that watches a run may change it.
    assert losses(tmp_path / "run") == losses(world.run)


# --- going on -----------------------------------------------------------------------------------


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


# --- other starting points and other parts ------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "checkpoints", f"checkpoints/{WARM_STEPS}"])
def test_init_from_takes_the_lens_of_another_run(world, tmp_path, monkeypatch, inside):
    seen = []

    def remember(run, stage, trainable, frozen):
        seen.append(trainable)
        return trainable

    monkeypatch.setattr(loop, "run_stage", remember)
    train_lens(plain(world, tmp_path / "run", train__init_from=str(world.run / inside)))
    step = WARM_STEPS if inside.endswith(str(WARM_STEPS)) else LAST_STEP
    assert_same_arrays(seen[0], saved(world, world.run, step))


def test_joint_stage_can_begin_at_another_run(world, tmp_path, unwatched):
    start = world.run / "checkpoints" / str(WARM_STEPS)
    session = plain(world, tmp_path / "run", warm__steps=0, train__init_from=str(start))
    run = train_lens(session)
    assert [stage for stage, _, _ in losses(run)] == ["joint"] * JOINT_STEPS
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    assert abs(records[0]["lm"]) < 1e-5  # L_LM's reference is the decoder that it began with
    assert all_steps(run / "checkpoints")[-1] == JOINT_STEPS


def test_init_from_that_does_not_fit(world, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        train_lens(plain(world, tmp_path / "a", train__init_from=str(tmp_path)))
    session = plain(
        world, tmp_path / "b", train__init_from=str(world.run), lens__encoder_prompt="the <text>"
    )
    with pytest.raises(CheckpointError, match=r"encoder\.soft_prompt has shape \(1, 16\)"):
        train_lens(session)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        (
            {
                "lens__train_decoder": "frozen",
                "lens__train_encoder": "frozen",
                "lens__dual_path": False,
                "loss__lm_reference": "text",
                "warm__steps": 1,
            },
            {"decoder": {"projection", "soft_prompt"}, "encoder": {"projection", "soft_prompt"}},
        ),
        (
            {
                "warm__steps": 0,
                "lens__train_decoder": "frozen",
                "lens__train_output_head": True,
                "lens__train_projections": False,
                "loss__lm_reference": "prompt",
            },
            {"decoder": {"soft_prompt", "output_head"}, "encoder": {"base", "soft_prompt"}},
        ),
        (
            {
                "warm__steps": 1,
                "lens__train_decoder": "lora",
                "lens__train_encoder": "lora",
                "lens__train_projections": False,
                "lens__train_soft_prompt": False,
                "lens__input_patches": 1,
            },
            {"decoder": {"lora", "input_patches"}, "encoder": {"lora"}},
        ),
    ],
    ids=["both frozen", "head and encoder", "adapters"],
)
def test_only_the_chosen_parts_train(world, tmp_path, unwatched, changes, trained):
    session = plain(world, tmp_path / "run", joint__steps=1, checkpoint__every=1, **changes)
    run = train_lens(session)
    reference = training_reference(open_caches(session)[0])
    start, frozen = init_lens(session.model.params, session.spec, reference.mean_D, reference.scale)
    assert {side: set(parts) for side, parts in start.items()} == trained
    before = start
    for step in all_steps(run / "checkpoints"):
        after = load_lens(run / "checkpoints", start, step)
        for side, parts in trained.items():
            for part in parts:
                assert has_changed(before[side][part], after[side][part]), (step, side, part)
        before = after
    assert all(math.isfinite(loss) for _, _, loss in losses(run))
    assert_same_arrays(session.model.params, frozen["original"])


def has_changed(before, after) -> bool:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return any((np.asarray(x) != np.asarray(y)).any() for x, y in pairs)


def test_a_copy_to_the_devices_in_every_step_is_refused(world, unwatched, monkeypatch, tmp_path):
    """A batch that stayed on the host would be copied at every call of the step."""

    def on_host(read, steps):
        return ((index, jax.tree.map(np.asarray, read(index))) for index in steps)

    monkeypatch.setattr(stage_loop, "prefetch", on_host)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train_lens(plain(world, tmp_path / "run"))
