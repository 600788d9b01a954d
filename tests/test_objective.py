"""The losses of both stages and the train step, against direct formulas on the plain lens."""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_lens import (
    BATCH,
    TEXT_LEN,
    plain_encoder_table,
    plain_predictions,
    plain_prompt,
    plain_reconstruction,
    plain_swap,
    plain_text,
    relative_error,
    tiny_batch,
    tiny_lens,
    tiny_noise,
    tiny_spec,
)

from conlens_jax.config import (
    ExperimentConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    WarmConfig,
    constant,
)
from conlens_jax.lens.gumbel import Purpose, drawn_noise, example_keys
from conlens_jax.lens.objective import (
    TERMS,
    Objective,
    joint_loss,
    prepare,
    reference_text,
    source_window,
    swap_vector,
    warm_loss,
)
from conlens_jax.lens.original import text_alone
from conlens_jax.models.transformer import forward
from conlens_jax.parallel.mesh import AXES, batch_sharding, replicated
from conlens_jax.training import state as training_state
from conlens_jax.training.state import Stage, init_state, make_step, stage_optimizer

HORIZON, BEFORE, AFTER = 2, 3, 1
WARM = WarmConfig(before=BEFORE, after=AFTER)
WEIGHTS = {"lm": 0.3, "kl": 1.7, "mse": 0.6, "entropy": 0.2, "text": 0.4}
SIGNS = {"lm": 1, "kl": 1, "mse": 1, "entropy": -1, "text": 1}
ALL_TERMS = LossConfig(
    **{name: constant(value) for name, value in WEIGHTS.items()},
    lm_reference="text",
    kl_horizon=HORIZON,
)
# For what is not about the terms themselves.
FEW_TERMS = dataclasses.replace(ALL_TERMS, lm=constant(0.0), text=constant(0.0))
TAU = 0.8


def approx(value, rel=1e-5):
    return pytest.approx(float(value), rel=rel)


def weights_of(values=WEIGHTS):
    return {name: jnp.float32(value) for name, value in values.items()}


def objective_of(loss: LossConfig = ALL_TERMS, **lens) -> Objective:
    return Objective(loss, WARM, tiny_spec(**lens))


@functools.cache
def case():
    """(trainable, frozen, batch, noise)."""
    spec = tiny_spec()
    trainable, frozen = tiny_lens(spec)
    frozen["warm_decoder"] = tiny_lens(spec, seed=1)[0]["decoder"]
    return trainable, frozen, tiny_batch(spec, frozen["original"]), tiny_noise()


def joint(trainable, frozen, batch, noise_BTV, weights, tau=TAU, *, objective):
    """(total, terms), gradient; one program for every ``tau``."""
    tau = jnp.float32(tau)
    return _joint(trainable, frozen, batch, noise_BTV, weights, tau, objective=objective)


@functools.partial(jax.jit, static_argnames="objective")
def _joint(trainable, frozen, batch, noise_BTV, weights, tau, *, objective):
    prepared = prepare(trainable, frozen, batch, noise_BTV, objective=objective)
    loss = functools.partial(joint_loss, objective=objective)
    return jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch, prepared, weights, tau)


# --- the direct formulation ---------------------------------------------------------------------


def plain_kl(target, other):
    p = jax.nn.softmax(target)
    return jnp.mean(jnp.sum(p * (jnp.log(p) - jnp.log(jax.nn.softmax(other))), axis=-1))


def plain_error(found, wanted):
    """The default error: of the direction and of the norm."""
    sizes = jnp.linalg.norm(found, axis=-1), jnp.linalg.norm(wanted, axis=-1)
    cos = jnp.sum(found * wanted, axis=-1) / sizes[0] / sizes[1]
    return jnp.mean(2 - 2 * cos + (sizes[0] / sizes[1] - 1) ** 2)


def plain_warm(trainable, frozen, batch, spec):
    """(encoder_error, decoder_nll)."""
    rows = np.arange(BATCH)[:, None]
    place = np.asarray(batch.positions_B)[:, None] + np.arange(-BEFORE + 1, AFTER + 1)
    window = np.asarray(batch.tokens_GS)[rows, place]
    text_BTD = plain_encoder_table(trainable, frozen)[window]
    found = plain_reconstruction(trainable, frozen, text_BTD, spec)
    prompt = plain_prompt(trainable, frozen, batch.activation_BD, spec)
    history = trainable["decoder"]["base"]["embedding"][window[:, :-1]]
    x_BSD = jnp.concatenate([prompt, history], axis=1)
    logits = plain_predictions(trainable, frozen, x_BSD, spec)[:, prompt.shape[1] - 1 :]
    log_p = jnp.log(jax.nn.softmax(logits))
    written = jnp.take_along_axis(log_p, jnp.asarray(window)[..., None], axis=-1)
    return plain_error(found, batch.activation_BD), -jnp.mean(written)


def plain_terms(trainable, frozen, batch, noise_BTV, spec, through_delta, tau):
    logits, choice = plain_text(trainable, frozen, batch.activation_BD, noise_BTV, tau, spec)
    text_BTD = choice @ plain_encoder_table(trainable, frozen)
    found = plain_reconstruction(trainable, frozen, text_BTD, spec)
    delta = batch.activation_BD - found
    stopped = jax.lax.stop_gradient(delta)
    delta = stopped + through_delta * (delta - stopped)
    partner = (np.arange(BATCH) - 1) % BATCH
    swapped = plain_swap(frozen["original"], batch, found + delta[partner], spec)
    clean = forward(frozen["original"], batch.tokens_GS, config=spec.model, mask_BS=batch.mask_GS)
    rows = np.arange(BATCH)[:, None]
    window = np.asarray(batch.positions_B)[:, None] + np.arange(HORIZON)
    text_BT = jnp.argmax(choice, axis=-1)
    start = jnp.full((BATCH, 1), spec.bos, text_BT.dtype)
    alone = forward(
        frozen["original"], jnp.concatenate([start, text_BT[:, :-1]], 1), config=spec.model
    )
    p = jax.nn.softmax(logits)
    return {
        "mse": plain_error(found, batch.activation_BD),
        "kl": plain_kl(clean[rows, window], swapped[rows, window]),
        "lm": plain_kl(alone, logits),
        "entropy": -jnp.mean(jnp.sum(p * jnp.log(p), axis=-1)),
        "text": sum(plain_warm(trainable, frozen, batch, spec)),
    }


def plain_joint(trainable, frozen, noise_BTV, weights, through_delta, tau=TAU):
    return _plain_joint(trainable, frozen, noise_BTV, weights, through_delta, jnp.float32(tau))


@jax.jit
def _plain_joint(trainable, frozen, noise_BTV, weights, through_delta, tau):
    spec, (_, _, batch, _) = tiny_spec(), case()

    def total(trainable):
        terms = plain_terms(trainable, frozen, batch, noise_BTV, spec, through_delta, tau)
        return sum(SIGNS[name] * weights[name] * terms[name] for name in terms), terms

    return jax.value_and_grad(total, has_aux=True)(trainable)


# --- the joint loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [True, False])
def test_joint_loss_and_gradient_equal_the_direct_formulation(stop):
    trainable, frozen, batch, noise = case()
    objective = objective_of(stop_gradient_delta=stop)
    (total, terms), gradient = joint(
        trainable, frozen, batch, noise, weights_of(), objective=objective
    )
    (expected, expected_terms), oracle = plain_joint(
        trainable, frozen, noise, weights_of(), jnp.float32(not stop)
    )
    for name in WEIGHTS:
        assert terms[name] == approx(expected_terms[name]), name
    assert total == approx(expected)
    by_hand = sum(SIGNS[name] * WEIGHTS[name] * float(terms[name]) for name in WEIGHTS)
    assert total == approx(by_hand, 1e-6)
    assert relative_error(gradient, oracle) < 3e-5
    # The switch matters: with the other setting the comparison would fail.
    _, other = plain_joint(trainable, frozen, noise, weights_of(), jnp.float32(stop))
    assert relative_error(gradient, other) > 1e-2


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0])
def test_gradient_of_every_part_at_every_temperature(tau):
    """Both clones, projections and prompts, through the whole loss."""
    trainable, frozen, batch, noise = case()
    inputs = (noise, weights_of())
    _, gradient = joint(trainable, frozen, batch, *inputs, tau, objective=objective_of())
    _, oracle = plain_joint(trainable, frozen, *inputs, jnp.float32(0), tau)
    assert set(gradient["decoder"]) == set(gradient["encoder"])
    # 1/tau multiplies the gradient through a token, and with it the rounding of both sides: at 0.1
    # the oracle itself changes by up to 2.6e-5 when every parameter moves by its last bit.
    assert relative_error(gradient, oracle) < 1e-5 * max(1, 0.5 / tau)


@pytest.mark.parametrize("dual, stop", [(False, True), (True, True), (True, False)])
def test_vector_that_is_swapped_in(dual, stop):
    """ã = â + (a' − â') of the row before; Δ is a constant where the switch says so."""
    spec = tiny_spec(dual_path=dual, stop_gradient_delta=stop)
    rng = np.random.default_rng(0)
    found, actual, cotangent = (
        jnp.asarray(rng.standard_normal((4, 32)), jnp.float32) for _ in range(3)
    )
    vector, pull = jax.vjp(lambda found: swap_vector(found, actual, spec), found)
    before = [3, 0, 1, 2]
    expected = found + (actual - found)[jnp.asarray(before)] if dual else found
    np.testing.assert_allclose(vector, expected, atol=1e-6)
    behind = cotangent[jnp.asarray([1, 2, 3, 0])]
    expected = cotangent - behind if dual and not stop else cotangent
    np.testing.assert_allclose(pull(cotangent)[0], expected, atol=1e-6)


def test_dual_path_with_a_perfect_partner_changes_nothing():
    spec = tiny_spec(dual_path=True)
    found = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32)), jnp.float32)
    np.testing.assert_array_equal(swap_vector(found, found, spec), found)


def test_a_term_of_weight_zero_is_not_computed():
    trainable, frozen, batch, noise = case()
    used = {"kl": {"context"}, "lm": {"reference"}, "text": set(), "mse": set()}
    for name, fields in used.items():
        others = {other: constant(0.0) for other in TERMS if other != name}
        objective = objective_of(LossConfig(**others, **{name: constant(0.5)}, lm_reference="text"))
        assert {term for term in TERMS if objective.uses(term)} == {name}
        make = functools.partial(prepare, objective=objective)
        prepared = jax.eval_shape(make, trainable, frozen, batch, noise)
        found = {f for f in ("context", "reference") if getattr(prepared, f) is not None}
        assert found == fields
        loss = functools.partial(joint_loss, objective=objective)
        _, terms = jax.eval_shape(
            loss, trainable, frozen, batch, prepared, weights_of(), jnp.float32(1.0)
        )
        watched = {"mse", "entropy"} | (
            {"encoder_error", "decoder_nll"} if name == "text" else set()
        )
        assert set(terms) == watched | {name}


@pytest.mark.parametrize(
    ("schedule", "used"),
    [
        (constant(0.0), False),
        (constant(0.1), True),
        (ScheduleConfig("constant", 0.0, 5.0), False),  # a constant is its start
        (ScheduleConfig("linear", 0.0, 0.1), True),
        (ScheduleConfig("cosine", 0.1, 0.0), True),
        (ScheduleConfig("linear", 0.0, 0.0), False),
    ],
)
def test_which_schedules_are_always_zero(schedule, used):
    objective = objective_of(dataclasses.replace(ALL_TERMS, kl=schedule))
    assert objective.uses("kl") == used


def test_unused_terms_do_not_enter_the_total():
    """The entropy is watched but has weight 0: whatever weight is handed in, it is left out."""
    trainable, frozen, batch, noise = case()
    zero = {name: constant(0.0) for name in TERMS if name != "mse"}
    objective = objective_of(LossConfig(**zero, mse=constant(1.0)))

    @jax.jit
    def run(trainable, frozen):
        prepared = prepare(trainable, frozen, batch, noise, objective=objective)
        return joint_loss(
            trainable, frozen, batch, prepared, weights_of(), jnp.float32(1.0), objective=objective
        )

    total, terms = run(trainable, frozen)
    assert terms["entropy"] > 0.1
    assert total == approx(WEIGHTS["mse"] * terms["mse"], 1e-6)


def test_bfloat16_gradients_have_the_dtype_of_their_parts():
    """Traced under strict dtype promotion, with every term and the dual path."""
    spec = tiny_spec(dtype="bfloat16")
    trainable, frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case()[:2])
    frozen["statistics"] = case()[1]["statistics"]
    loss = dataclasses.replace(ALL_TERMS, mse_kind="raw", lm_reference="warm")
    run = functools.partial(joint, objective=Objective(loss, WARM, spec))
    (total, terms), gradient = jax.eval_shape(run, trainable, frozen, *case()[2:], weights_of())
    assert {total.dtype, *(term.dtype for term in terms.values())} == {jnp.dtype("float32")}
    same = jax.tree.map(lambda g, x: g.dtype == x.dtype, gradient, trainable)
    assert all(jax.tree.leaves(same))


# --- L_LM's reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "prompt", "warm"])
def test_reference_of_the_language_loss(kind):
    """M on the text alone, M under the text prompt, or the decoder as the warm start left it."""
    trainable, frozen, batch, _ = case()
    spec, original = tiny_spec(), frozen["original"]
    text_BT = batch.tokens_GS[:, :TEXT_LEN]
    objective = objective_of(dataclasses.replace(ALL_TERMS, lm_reference=kind))
    make = jax.jit(lambda *inputs: reference_text(*inputs, objective).logits())
    found = make(frozen, batch.activation_BD, text_BT)

    def direct():
        if kind == "warm":
            warm = {"decoder": frozen["warm_decoder"]}
            prompt = plain_prompt(warm, frozen, batch.activation_BD, spec)
            seen = warm["decoder"]["base"]["embedding"][text_BT]
            logits = plain_predictions(warm, frozen, jnp.concatenate([prompt, seen], 1), spec)
            return logits[:, prompt.shape[1] - 1 : -1]
        start = {"text": (1,), "prompt": (1, 5, 6, 7)}[kind]
        tokens = np.concatenate([np.tile(start, (BATCH, 1)), text_BT], axis=1)
        return forward(original, tokens.astype(np.int32), config=spec.model)[:, len(start) - 1 : -1]

    np.testing.assert_allclose(found, jax.jit(direct)(), rtol=0, atol=3e-5)


def test_reference_without_a_first_token_is_uniform_there():
    _, frozen, batch, _ = case()
    spec = tiny_spec(bos=None)
    text_BT = batch.tokens_GS[:, :TEXT_LEN]
    alone = jax.jit(lambda original: text_alone(original, text_BT, (), spec).logits())
    found = alone(frozen["original"])
    assert np.ptp(found[:, 0]) == 0
    whole = jax.jit(lambda original: forward(original, text_BT, config=spec.model))
    rest = whole(frozen["original"])[:, :-1]
    np.testing.assert_allclose(found[:, 1:], rest, rtol=0, atol=2e-5)


# --- the warm start -----------------------------------------------------------------------------


def test_window_holds_the_tokens_up_to_the_position_and_behind_it():
    tokens_BS = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)
    window = source_window(tokens_BS, jnp.asarray([4, 7], jnp.int32), before=3, after=2)
    assert window.tolist() == [[2, 3, 4, 5, 6], [15, 16, 17, 18, 19]]
    assert source_window(tokens_BS, jnp.asarray([0, 9], jnp.int32), 1, 0).tolist() == [[0], [19]]


def test_warm_loss_equals_the_direct_formula():
    trainable, frozen, batch, _ = case()
    run = jax.jit(functools.partial(warm_loss, objective=objective_of()))
    total, terms = run(trainable, frozen, batch)
    direct = jax.jit(lambda trainable: plain_warm(trainable, frozen, batch, tiny_spec()))
    encoder_error, decoder_nll = direct(trainable)
    assert terms["encoder_error"] == approx(encoder_error)
    assert terms["decoder_nll"] == approx(decoder_nll)
    assert total == approx(encoder_error + decoder_nll)


# --- the train step -----------------------------------------------------------------------------

CONFIG = ExperimentConfig(train=TrainConfig(seed=11), loss=ALL_TERMS)
# Without a clip, Adam's first moment after one step is (1 − b1) times the gradient.
OPTIMIZER = OptimizerConfig(learning_rate=constant(1e-3), clip_norm=1e9, b1=0.5)


def gradient_in(state):
    return jax.tree.map(lambda mu: 2 * mu, optax.tree.get(state.opt_state, "mu"))


def mesh_of(devices: int):
    shape = {1: (1, 1, 1), 2: (2, 1, 1), 8: (4, 2, 1)}[devices]
    types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(shape, AXES, axis_types=types, devices=jax.devices()[:devices])


def new_state(stage, trainable):
    """The step donates its state: the arrays of ``trainable`` stay usable."""
    optimizer = stage_optimizer(stage, trainable, 100)
    return init_state(jax.tree.map(jnp.copy, trainable), optimizer)


def compiled_step(stage, config, state, frozen, batch):
    optimizer = stage_optimizer(stage, state.params, 100)
    objective = Objective(config.loss, WARM, tiny_spec())
    step = make_step(stage, objective, optimizer, seed=config.train.seed, n_rows=100)
    return step.lower(state, frozen, batch).compile()


def warm_loss_that_can_overflow(trainable, frozen, batch, gap_keys_B, *, objective):
    """Infinite, with finite gradients, where the first length is negative; else the warm loss."""
    total, terms = warm_loss(trainable, frozen, batch, gap_keys_B, objective=objective)
    return total + jnp.where(batch.lengths_G[0] < 0, jnp.inf, 0.0), terms


@functools.cache
def warm_step(parts: int):
    """(stage, compiled step)."""
    trainable, frozen, batch, _ = case()
    stage = Stage("warm", 10, BATCH, dataclasses.replace(OPTIMIZER, accumulate=parts))
    with mock.patch.object(training_state, "warm_loss", warm_loss_that_can_overflow):
        step = compiled_step(stage, CONFIG, new_state(stage, trainable), frozen, batch)
    return stage, step


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    """Of the warm start; in the joint stage a row's partner is of its own micro-batch."""
    trainable, frozen, batch, _ = case()
    results = []
    for parts in (1, 2):
        stage, step = warm_step(parts)
        state, metrics = step(new_state(stage, trainable), frozen, batch)
        results.append((gradient_in(state), metrics))
    (whole, metrics), (parts, part_metrics) = results
    assert relative_error(parts, whole) < 1e-6
    for name in ("loss", "encoder_error", "decoder_nll", "grad_norm"):
        assert part_metrics[name] == approx(metrics[name], 1e-6), name


def test_joint_step_on_eight_devices_takes_the_gradient_of_the_scheduled_loss():
    """Noise from (seed, step, example), weights and temperature from their schedules."""
    trainable, frozen, batch, _ = case()
    loss = dataclasses.replace(
        FEW_TERMS, kl=ScheduleConfig("linear", 0.0, 4.0), tau=ScheduleConfig("linear", 1.2, 0.2)
    )
    config = dataclasses.replace(CONFIG, loss=loss)
    stage = Stage("joint", 10, BATCH, OPTIMIZER)
    mesh = mesh_of(8)
    state = dataclasses.replace(new_state(stage, trainable), step=jnp.int32(4))
    state, everywhere = jax.device_put((state, frozen), replicated(mesh))
    sharded = jax.device_put(batch, batch_sharding(mesh))
    assert len(sharded.activation_BD.sharding.device_set) == 8
    step = compiled_step(stage, config, state, everywhere, sharded)
    state, metrics = step(state, everywhere, sharded)

    # At step 4 of 10 tau is 0.8 and the KL's weight 1.6.
    noise = noise_of_step(jnp.int32(4), batch.examples_B)
    weights = weights_of(WEIGHTS | {"kl": 1.6, "lm": 0.0, "text": 0.0})
    assert metrics["tau"] == approx(TAU)
    assert metrics["weight_kl"] == approx(1.6)
    (total, terms), gradient = plain_joint(trainable, frozen, noise, weights, jnp.float32(0.0))
    assert metrics["loss"] == approx(total)
    for name in ("kl", "mse", "entropy"):
        assert metrics[name] == approx(terms[name]), name
    assert relative_error(gradient_in(state), gradient) < 3e-5
    assert state.step == 5


def noise_of_step(step, examples_B):
    keys = example_keys(CONFIG.train.seed, step, examples_B, Purpose.TRAINING_TEXT)
    return drawn_noise(keys, TEXT_LEN).values(48)


@jax.jit
def sampled(trainable, frozen, batch):
    """The text of each row, and the loss on it."""
    objective = objective_of(FEW_TERMS)
    noise = noise_of_step(jnp.int32(0), batch.examples_B)
    prepared = prepare(trainable, frozen, batch, noise, objective=objective)
    total, _ = joint_loss(
        trainable, frozen, batch, prepared, weights_of(), jnp.float32(TAU), objective=objective
    )
    return prepared.text_BT, total


def sampled_on(devices: int, batch):
    trainable, frozen, _, _ = case()
    mesh = mesh_of(devices)
    weights = jax.device_put((trainable, frozen), replicated(mesh))
    return sampled(*weights, jax.device_put(batch, batch_sharding(mesh)))


def test_text_and_loss_do_not_depend_on_the_number_of_devices():
    batch = case()[2]
    text, total = sampled_on(1, batch)
    assert len(np.unique(text, axis=0)) > BATCH // 2
    for devices in (2, 8):
        other_text, other_total = sampled_on(devices, batch)
        np.testing.assert_array_equal(other_text, text)
        assert other_total == approx(total)


def test_text_belongs_to_the_example_and_not_to_its_place_in_the_batch():
    batch = case()[2]
    text, _ = sampled_on(1, batch)
    order = np.random.default_rng(3).permutation(BATCH)
    shuffled, _ = sampled_on(1, jax.tree.map(lambda x: x[order], batch))
    np.testing.assert_array_equal(shuffled, np.asarray(text)[order])


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    trainable, frozen, batch, _ = case()
    stage, step = warm_step(1)
    state = new_state(stage, trainable)
    not_a_number = batch.activation_BD.at[2, 3].set(jnp.nan)
    broken_batches = (
        dataclasses.replace(batch, activation_BD=not_a_number),
        dataclasses.replace(batch, lengths_G=batch.lengths_G.at[0].set(-1)),
    )
    for bad_steps, broken in enumerate(broken_batches, start=1):
        state, metrics = step(state, frozen, broken)
        assert not np.isfinite(metrics["loss"])
        assert metrics["bad_steps_in_a_row"] == metrics["bad_steps"] == bad_steps
        jax.tree.map(np.testing.assert_array_equal, state.params, trainable)
    state, metrics = step(state, frozen, batch)
    assert (metrics["bad_steps_in_a_row"], metrics["bad_steps"]) == (0, 2)
    assert state.step == 3 and np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), state.params, trainable)
    assert all(jax.tree.leaves(moved))
    _, after = step(state, frozen, batch)
    assert after["loss"] < metrics["loss"]  # it goes downhill
