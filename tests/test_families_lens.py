"""The lens on every kind of network, against plain autodiff.

The oracle is the naive step: no cache, every pass over whole sequences, every gradient where it
stands. Ours takes attention apart to go back token by token, so whatever a family does between
⟨q, k⟩ and the residual stream is gone through twice: in values and in the exact gradient through
the sampled text. That is compared for every kind; the rest of the joint step runs layers as any
pass does, and is compared where most of a family's own stands beside the residual stream.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import oracle, pulled, write
from tiny_lens import (
    BATCH,
    TEXT_LEN,
    plain_text,
    relative_error,
    tiny_batch,
    tiny_lens,
    tiny_noise,
    tiny_spec,
)

from benchmark.naive import naive_loss
from conlens_jax.config import LossConfig, WarmConfig, constant
from conlens_jax.lens.objective import Objective, joint_loss, prepare

WEIGHTS = {"lm": 0.3, "kl": 1.7, "mse": 0.6, "entropy": 0.2, "text": 0.4}
LOSS = LossConfig(
    **{name: constant(value) for name, value in WEIGHTS.items()},
    lm_reference="text",
    kl_horizon=2,
)
TAU = 0.5
# One family a kind of network, with its head tied as in the published models: learned positions
# (from row 2 on) and layer norms; a parallel residual after one norm, a bias at the head; soft
# caps; two rotations and windows, layers of several shapes that share keys and have inputs of their
# own; norms at the outputs; experts and sinks.
KINDS = {
    "opt": True,
    "phi": False,
    "gemma2": True,
    "gemma4_text": True,
    "olmo2": False,
    "gpt_oss": False,
}


@functools.partial(jax.jit, static_argnames="objective")
def ours(trainable, frozen, batch, noise, weights, *, objective):
    prepared = prepare(trainable, frozen, batch, noise, objective=objective)
    loss = functools.partial(joint_loss, objective=objective)
    inputs = (frozen, batch, prepared, weights, jnp.float32(TAU))
    return jax.value_and_grad(loss, has_aux=True)(trainable, *inputs)


@functools.partial(jax.jit, static_argnames="objective")
def plain(trainable, frozen, batch, noise, weights, *, objective):
    # A scan over the tokens compiles sooner than the naive step's growing prefix.
    loss = functools.partial(naive_loss, objective=objective, write=plain_text)
    inputs = (frozen, batch, noise, weights, jnp.float32(TAU))
    return jax.value_and_grad(loss, has_aux=True)(trainable, *inputs)


def without_key_biases(gradient):
    """Where keys are not rotated, their bias moves all scores of a query alike, and no softmax sees
    it: what is there of its gradient is rounding."""
    found = jax.tree_util.tree_leaves_with_path(gradient)
    names = {jax.tree_util.keystr(path): leaf for path, leaf in found}
    return {name: leaf for name, leaf in names.items() if "key_bias" not in name}


def spec_of(family):
    spec = tiny_spec(family=family, tied=KINDS[family])
    # test_experts compares the forms of a mixture of experts; the dense one compiles soonest.
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, experts="dense"))


@pytest.mark.parametrize("family", KINDS)
def test_gradient_through_the_text_equals_plain_autodiff(family):
    spec, noise, tau = spec_of(family), tiny_noise(), jnp.float32(TAU)
    trainable, frozen = tiny_lens(spec)
    activation_BD = tiny_batch(spec, frozen["original"]).activation_BD
    cotangent = np.random.default_rng(5).standard_normal((BATCH, TEXT_LEN, 48)).astype(np.float32)
    inputs = (trainable, frozen, activation_BD)
    expected_logits, tokens, expected = oracle(
        *inputs, noise, tau, cotangent, jnp.float32(1), spec=spec
    )
    text_BT = write(*inputs, noise, spec=spec)
    np.testing.assert_array_equal(text_BT, tokens)
    logits, gradient = pulled(*inputs, text_BT, noise, tau, cotangent, spec=spec)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)
    if spec.model.rope is None:
        gradient, expected = without_key_biases(gradient), without_key_biases(expected)
    assert relative_error(gradient, expected) < 1e-5


def test_joint_step_equals_plain_autodiff():
    spec = spec_of("gemma4_text")
    objective = Objective(LOSS, WarmConfig(before=3, after=1), spec)
    trainable, frozen = tiny_lens(spec)
    batch = tiny_batch(spec, frozen["original"])
    weights = {name: jnp.float32(value) for name, value in WEIGHTS.items()}
    inputs = (trainable, frozen, batch, tiny_noise(), weights)
    (total, terms), gradient = ours(*inputs, objective=objective)
    (expected, expected_terms), naive = plain(*inputs, objective=objective)
    for name, value in expected_terms.items():
        assert terms[name] == pytest.approx(float(value), rel=2e-5), name
    assert total == pytest.approx(float(expected), rel=2e-5)
    assert relative_error(gradient, naive) < 5e-5
