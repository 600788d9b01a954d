"""Sampling a token differentiably, against the textbook form and the softmax itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import relative_error

from conlens_jax.lens.gumbel import drawn_noise, example_keys, straight_through_embed

BATCH, TEXT, VOCAB, WIDTH = 5, 3, 11, 7
# 0.1 % points of chi-square with 5 and 35 degrees of freedom.
CRITICAL_5, CRITICAL_35 = 20.5, 66.6


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((BATCH, TEXT, VOCAB)), jnp.float32)
    noise = jnp.asarray(rng.gumbel(size=(BATCH, TEXT, VOCAB)), jnp.float32)
    table = jnp.asarray(rng.standard_normal((VOCAB, WIDTH)), jnp.float32)
    cotangent = jnp.asarray(rng.standard_normal((BATCH, TEXT, WIDTH)), jnp.float32)
    return logits, noise, table, cotangent


@jax.jit
def _ours(logits, noise, table, tau, cotangent):
    tokens = jnp.argmax(logits + noise, axis=-1)
    embed = lambda logits, table: straight_through_embed(logits, noise, tokens, table, tau)
    value, pull = jax.vjp(embed, logits, table)
    return value, pull(cotangent)


@jax.jit
def _textbook(logits, noise, table, tau, cotangent):
    def embed(logits, table):
        hard = jax.nn.one_hot(jnp.argmax(logits + noise, axis=-1), VOCAB)
        soft = jax.nn.softmax((logits + noise) / tau)
        return (hard + soft - jax.lax.stop_gradient(soft)) @ table

    value, pull = jax.vjp(embed, logits, table)
    return value, pull(cotangent)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0])
def test_gradient_is_that_of_the_textbook_form(inputs, tau):
    logits, noise, table, cotangent = inputs
    _, gradient = _ours(logits, noise, table, jnp.float32(tau), cotangent)
    _, oracle = _textbook(logits, noise, table, jnp.float32(tau), cotangent)
    assert relative_error(gradient, oracle) < 1e-5


def test_value_is_the_row_of_the_token(inputs):
    logits, noise, table, cotangent = inputs
    value, _ = _ours(logits, noise, table, jnp.float32(1.0), cotangent)
    tokens = np.argmax(np.asarray(logits) + np.asarray(noise), axis=-1)
    np.testing.assert_array_equal(value, np.asarray(table)[tokens])
    # The tokens are taken as they are given, not chosen again.
    given = straight_through_embed(logits, noise, jnp.full_like(tokens, 2), table, jnp.float32(1))
    np.testing.assert_array_equal(given, np.broadcast_to(table[2], given.shape))


def test_noise_and_temperature_get_no_gradient(inputs):
    logits, noise, table, cotangent = inputs
    tokens = jnp.argmax(logits + noise, axis=-1)

    def loss(noise, tau):
        embedded = straight_through_embed(logits, noise, tokens, table, tau)
        return jnp.sum(embedded * cotangent)

    for gradient in jax.grad(loss, argnums=(0, 1))(noise, jnp.float32(1.0)):
        assert not np.any(gradient)


def test_noise_belongs_to_the_example():
    """Not to its place in the batch, nor to the rows around it."""
    draw = lambda examples, step=3, seed=7, purpose=1: np.asarray(
        drawn_noise(
            example_keys(seed, jnp.int32(step), jnp.asarray(examples, jnp.int32), purpose), 4
        ).values(6)
    )
    noise = draw([0, 1, 2, 3, 4])
    np.testing.assert_array_equal(draw([4, 1, 3]), noise[[4, 1, 3]])
    np.testing.assert_array_equal(draw([2]), noise[2:3])
    # All numbers differ between examples, tokens and words, and with step, seed and purpose.
    assert len(np.unique(noise)) > 0.99 * noise.size
    for other in (draw(range(5), step=4), draw(range(5), seed=8), draw(range(5), purpose=2)):
        assert np.mean(other == noise) < 0.01


def test_sampled_frequencies_are_the_softmax():
    """Chi-square of 24,000 draws, and of neighbouring pairs: tokens are drawn independently."""
    rows, text, vocab = 4000, 6, 6
    logits = np.array([0.5, -1.0, 0.0, 1.5, -0.3, 0.8])
    keys = example_keys(0, jnp.int32(0), jnp.arange(rows, dtype=jnp.int32), 1)
    noise = np.asarray(drawn_noise(keys, text).values(vocab))
    tokens = np.argmax(logits + noise, axis=-1)
    p = np.exp(logits) / np.exp(logits).sum()
    expected = tokens.size * p
    counts = np.bincount(tokens.ravel(), minlength=vocab)
    assert np.sum((counts - expected) ** 2 / expected) < CRITICAL_5
    pairs = tokens[:, 0::2] * vocab + tokens[:, 1::2]
    expected = pairs.size * np.outer(p, p).ravel()
    counts = np.bincount(pairs.ravel(), minlength=vocab**2)
    assert np.sum((counts - expected) ** 2 / expected) < CRITICAL_35
