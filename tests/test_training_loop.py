"""Training runs: what they leave behind."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

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
    losses,
    open_world,
    quiet_console,
)
from training_runs import lens_template, plain, saved, unvalidated

from conlens_jax.config import to_json_dict, with_changes
from conlens_jax.data.batches import read_groups
from conlens_jax.lens.objective import warm_loss
from conlens_jax.models.model import load_model
from conlens_jax.tracking.records import read_metrics
from conlens_jax.training import loop, stage_loop
from conlens_jax.training.checkpoint import all_steps, read_metadata
from conlens_jax.training.loop import train_lens
from conlens_jax.training.run_folder import load_lens
from conlens_jax.training.session import (
    open_caches,
    open_session,
)
from conlens_jax.training.validation import Validation, validate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        world.run  # noqa: B018 (trained now, so that no test's time is this)
        yield world


@pytest.fixture
def unwatched(monkeypatch):
    monkeypatch.setattr(stage_loop, "validate", unvalidated)


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


def test_a_copy_to_the_devices_in_every_step_is_refused(world, unwatched, monkeypatch, tmp_path):
    """A batch that stayed on the host would be copied at every call of the step."""

    def on_host(read, steps):
        return ((index, jax.tree.map(np.asarray, read(index))) for index in steps)

    monkeypatch.setattr(stage_loop, "prefetch", on_host)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train_lens(plain(world, tmp_path / "run"))
