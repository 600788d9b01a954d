"""Training from another run, and of the chosen parts alone."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipeline import (
    JOINT_STEPS,
    LAST_STEP,
    WARM_STEPS,
    assert_same_arrays,
    losses,
    open_world,
)
from training_runs import lens_template, plain, saved, unvalidated

import conlens_jax
from conlens_jax.lens.decoder import teacher_forced_states
from conlens_jax.lens.encoder import encode_embeddings
from conlens_jax.lens.spec import decoder_of, encoder_of, init_lens
from conlens_jax.measurement.runner import ActivationStatistics
from conlens_jax.models.transformer import embed_tokens
from conlens_jax.tracking.records import read_metrics
from conlens_jax.training import loop, stage_loop
from conlens_jax.training.checkpoint import all_steps, read_metadata
from conlens_jax.training.checkpoint_storage import CheckpointError
from conlens_jax.training.loop import train_lens
from conlens_jax.training.run_folder import checkpoint_of, load_lens
from conlens_jax.training.session import (
    open_caches,
    training_reference,
)
from conlens_jax.training.starting_lens import starting_lens


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        world.run  # noqa: B018 (trained now, so that no test's time is this)
        yield world


@pytest.fixture
def unwatched(monkeypatch):
    monkeypatch.setattr(stage_loop, "validate", unvalidated)


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


# --- other activations, and saved lenses ---------------------------------------------------------


def test_a_lens_stays_the_same_function_of_the_activation(world, tmp_path):
    """Though the run that goes on normalises activations with statistics of its own."""
    template, frozen = lens_template(world)
    start = world.run / "checkpoints" / str(LAST_STEP)
    before = load_lens(start, template)
    statistics = read_metadata(*checkpoint_of(start))["statistics"]
    rng = np.random.default_rng(0)
    mean_D = np.asarray(statistics["mean"], np.float32)
    other = ActivationStatistics(
        mean_D + rng.normal(0, statistics["scale"], mean_D.shape).astype(np.float32),
        1.7 * statistics["scale"],
        0.5,
        9,
    )
    after = starting_lens(str(start), template, other)
    spec = world.session.spec
    activation_BD = jnp.asarray(mean_D + rng.normal(0, 3, (5, len(mean_D))), jnp.float32)
    text_BT = jnp.asarray(rng.integers(5, 50, (5, spec.text_len)), jnp.int32)

    def outputs(trainable, mean, scale):
        around = {**frozen, "statistics": {"mean": jnp.asarray(mean), "scale": jnp.float32(scale)}}
        decoder, encoder = decoder_of(trainable, around), encoder_of(trainable, around, spec)
        states = teacher_forced_states(decoder, activation_BD, text_BT, spec=spec)
        text_BTD = embed_tokens(encoder.base, text_BT, spec.model)
        return states, encode_embeddings(encoder, text_BTD, spec=spec)

    expected = outputs(before, mean_D, statistics["scale"])
    found = outputs(after, other.mean_D, other.scale)
    unchanged = outputs(before, other.mean_D, other.scale)
    for one, same, different in zip(found, expected, unchanged, strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-4, atol=1e-4)
        assert np.abs(different - same).max() > 0.1


def test_init_from_a_saved_lens(world, tmp_path, monkeypatch):
    folder = conlens_jax.Lens.load(world.run).save(tmp_path / "lens")
    seen = []

    def remember(run, stage, trainable, frozen):
        seen.append(trainable)
        return trainable

    monkeypatch.setattr(loop, "run_stage", remember)
    train_lens(plain(world, tmp_path / "run", train__init_from=str(folder)))
    assert_same_arrays(seen[0], saved(world, world.run, LAST_STEP))
    session = plain(
        world, tmp_path / "b", train__init_from=str(folder), lens__encoder_prompt="the <text>"
    )
    with pytest.raises(CheckpointError, match=r"init_from=.*do not fit this run's model.*\n.*soft"):
        train_lens(session)
