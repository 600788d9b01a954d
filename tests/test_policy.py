"""The score-function gradient: unbiased by enumeration, and in its place in the joint loss."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import (
    BATCH,
    TEXT_LEN,
    relative_error,
    teacher_forced_logits,
    tiny_batch,
    tiny_lens,
    tiny_spec,
)

from conlens_jax.config import LossConfig, WarmConfig, constant
from conlens_jax.lens.encoder import encode_tokens
from conlens_jax.lens.losses import cross_entropy, kl_divergence, reconstruction_error
from conlens_jax.lens.objective import Objective, joint_loss, prepare, swap_vector, warm_loss
from conlens_jax.lens.original import swapped_logits
from conlens_jax.lens.policy import advantages, policy_loss
from conlens_jax.lens.spec import decoder_of, encoder_of

COSTS = np.array([0.3, -1.0, 2.0])
GROUP = 2


def test_rloo_baseline_is_the_mean_of_the_others():
    cost = np.array([1.0, 5.0, 3.0, 2.0, 2.0, 2.0], np.float32)
    np.testing.assert_allclose(advantages(cost, 3, "rloo"), [-3.0, 3.0, 0.0, 0, 0, 0], atol=1e-6)


def test_grpo_advantages_have_spread_one_and_survive_equal_costs():
    cost = np.array([1.0, 5.0, 3.0, 2.0, 2.0, 2.0], np.float32)
    found = np.asarray(advantages(cost, 3, "grpo")).reshape(2, 3)
    assert found[0].std() == pytest.approx(1.0, rel=1e-4)
    assert not found[1].any()


@pytest.mark.parametrize("group_size", [2, 3])
def test_rloo_is_unbiased(group_size):
    """Over every group that can be drawn from three tokens, weighted with its probability."""
    logits = jnp.asarray([0.2, -0.7, 0.5], jnp.float32)

    def expected_cost(logits):
        return jnp.sum(jax.nn.softmax(logits) * jnp.asarray(COSTS, jnp.float32))

    @jax.jit
    def estimate(tokens):
        def loss(logits):
            log_p = jax.nn.log_softmax(logits)[tokens]
            return policy_loss(jnp.asarray(COSTS, jnp.float32)[tokens], log_p, group_size, "rloo")

        return jax.value_and_grad(loss)(logits)

    p = np.asarray(jax.nn.softmax(logits), np.float64)
    mean = np.zeros(3)
    for tokens in itertools.product(range(3), repeat=group_size):
        value, gradient = estimate(jnp.asarray(tokens))
        assert value == 0
        mean += np.prod(p[list(tokens)]) * np.asarray(gradient, np.float64)
    np.testing.assert_allclose(mean, jax.grad(expected_cost)(logits), atol=1e-6)


@functools.cache
def world(dual_path: bool):
    spec = tiny_spec(estimator="rloo", estimator_samples=GROUP, dual_path=dual_path)
    loss = LossConfig(mse=constant(0.6), kl=constant(1.7), lm=constant(0.0))
    objective = Objective(loss, WarmConfig(before=3, after=1), spec)
    trainable, frozen = tiny_lens(spec)
    batch = tiny_batch(spec, frozen["original"])
    noise = jnp.asarray(np.random.default_rng(0).gumbel(size=(BATCH * GROUP, TEXT_LEN, 48)))
    return objective, trainable, frozen, batch, noise.astype(jnp.float32)


WEIGHTS = {"mse": jnp.float32(0.6), "kl": jnp.float32(1.7)}


@functools.partial(jax.jit, static_argnames="objective")
def joint(trainable, frozen, batch, noise, *, objective):
    prepared = prepare(trainable, frozen, batch, noise, objective=objective)
    loss = functools.partial(joint_loss, objective=objective)
    weights = {name: jnp.float32(0.0) for name in ("lm", "entropy", "text")} | WEIGHTS
    value = jax.value_and_grad(loss, has_aux=True)(
        trainable, frozen, batch, prepared, weights, jnp.float32(1.0)
    )
    return value, prepared


@functools.partial(jax.jit, static_argnames="objective")
def by_hand(trainable, frozen, batch, prepared, *, objective):
    """The same from the text alone: E's gradient straight, D's as advantage times ∇ log p."""
    spec = objective.spec
    activation = jnp.repeat(batch.activation_BD, GROUP, axis=0)

    def costs(encoder_part):
        encoder = encoder_of({**trainable, "encoder": encoder_part}, frozen, spec)
        found = encode_tokens(encoder, prepared.text_BT, spec=spec)
        error = reconstruction_error(found, activation, frozen["statistics"], "direction+norm")
        put = swap_vector(found, activation, spec, GROUP)
        swapped = swapped_logits(frozen["original"], prepared.context, put, spec=spec)
        kl = kl_divergence(prepared.context.logits_BhV, swapped)[:, 0]
        return WEIGHTS["mse"] * error + WEIGHTS["kl"] * kl

    def log_p(decoder_part):
        decoder = decoder_of({**trainable, "decoder": decoder_part}, frozen)
        logits = teacher_forced_logits(decoder, activation, prepared.text_BT, spec=spec)
        return -jnp.sum(cross_entropy(logits, prepared.text_BT), axis=-1)

    total, encoder_gradient = jax.value_and_grad(lambda part: costs(part).mean())(
        trainable["encoder"]
    )
    first, second = costs(trainable["encoder"]).reshape(-1, 2).T
    advantage = jnp.stack([first - second, second - first], axis=1).reshape(-1)
    decoder_gradient = jax.grad(lambda part: jnp.mean(advantage * log_p(part)))(
        trainable["decoder"]
    )
    return total, {"decoder": decoder_gradient, "encoder": encoder_gradient}


@pytest.mark.parametrize("dual_path", [True, False])
def test_joint_loss_is_the_cost_and_its_gradient_that_of_the_policy(dual_path):
    objective, trainable, frozen, batch, noise = world(dual_path)
    ((total, _), gradient), prepared = joint(trainable, frozen, batch, noise, objective=objective)
    expected, oracle = by_hand(trainable, frozen, batch, prepared, objective=objective)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert relative_error(gradient, oracle) < 2e-5


def test_without_a_gradient_through_the_text_each_side_learns_from_its_own():
    """E from D's text (and the real windows), D from the real windows alone."""
    spec = tiny_spec(estimator="detached", dual_path=False)
    loss = LossConfig(
        mse=constant(0.6), kl=constant(1.7), lm=constant(0), entropy=constant(0), text=constant(1)
    )
    objective = Objective(dataclasses.replace(loss, text_read=False), world(False)[0].warm, spec)
    _, trainable, frozen, batch, noise = world(False)
    weights = {name: jnp.float32(value) for name, value in (("mse", 0.6), ("kl", 1.7), ("text", 1))}

    @jax.jit
    def ours(trainable):
        prepared = prepare(trainable, frozen, batch, noise[::GROUP], objective=objective)
        rest = (frozen, batch, prepared, weights, jnp.float32(1.0))
        run = functools.partial(joint_loss, objective=objective)
        return jax.grad(run, has_aux=True)(trainable, *rest), prepared

    (gradient, terms), prepared = ours(trainable)
    assert {"mse", "kl", "text", "decoder_nll"} == set(terms)

    def decoder_side(decoder):
        run = functools.partial(warm_loss, objective=objective, reads=False)
        return run({**trainable, "decoder": decoder}, frozen, batch)[0]

    def encoder_side(part):
        encoder = encoder_of({**trainable, "encoder": part}, frozen, spec)
        found = encode_tokens(encoder, prepared.text_BT, spec=spec)
        error = reconstruction_error(
            found, batch.activation_BD, frozen["statistics"], "direction+norm"
        )
        swapped = swapped_logits(frozen["original"], prepared.context, found, spec=spec)
        kl = kl_divergence(prepared.context.logits_BhV, swapped)[:, 0]
        return jnp.mean(0.6 * error + 1.7 * kl)

    assert (
        relative_error(gradient["encoder"], jax.jit(jax.grad(encoder_side))(trainable["encoder"]))
        < 2e-5
    )
    expected = jax.jit(jax.grad(decoder_side))(trainable["decoder"])
    assert relative_error(gradient["decoder"], expected) < 2e-5


def test_texts_of_a_row_differ_and_stand_together():
    objective, trainable, frozen, batch, noise = world(True)
    _, prepared = joint(trainable, frozen, batch, noise, objective=objective)
    assert prepared.text_BT.shape == (BATCH * GROUP, TEXT_LEN)
    text = np.asarray(prepared.text_BT).reshape(BATCH, GROUP, TEXT_LEN)
    assert (text[:, 0] != text[:, 1]).any()
    logits = np.asarray(prepared.context.logits_BhV)
    np.testing.assert_array_equal(logits[0::2], logits[1::2])
    alone = prepare(
        trainable,
        frozen,
        batch,
        noise[::GROUP],
        objective=Objective(objective.loss, objective.warm, tiny_spec()),
    )
    np.testing.assert_array_equal(alone.text_BT, text[:, 0])
