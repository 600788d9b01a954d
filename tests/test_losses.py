"""The terms of the loss against their formulas in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conlens_jax.lens.losses import (
    cross_entropy,
    direction_error,
    entropy,
    kl_divergence,
    reconstruction_error,
    squared_error,
)
from conlens_jax.measurement.runner import activation_statistics

ROWS, VOCAB, WIDTH = 40, 23, 16


@pytest.fixture(scope="module")
def logits():
    """Two sets of logits, from nearly flat to very peaked, in float64."""
    rng = np.random.default_rng(0)
    spread = np.geomspace(0.01, 20, ROWS)[:, None]
    return [spread * rng.standard_normal((ROWS, VOCAB)) + 5 for _ in range(2)]


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(1)
    size = np.geomspace(1e-2, 1e3, ROWS)[:, None]
    return [size * rng.standard_normal((ROWS, WIDTH)) + 1 for _ in range(2)]


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def single(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def test_kl_divergence(logits):
    log_p, log_q = map(log_softmax, logits)
    expected = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    np.testing.assert_allclose(kl_divergence(*single(*logits)), expected, rtol=1e-4, atol=1e-6)
    # It is not symmetric, and the target comes first.
    backward = np.sum(np.exp(log_q) * (log_q - log_p), axis=-1)
    assert np.max(np.abs(backward - expected)) > 1


def test_kl_divergence_of_a_distribution_with_itself(logits):
    (p,) = single(logits[0])
    np.testing.assert_array_equal(kl_divergence(p, p + 3.0 * 0), np.zeros(ROWS))
    total = lambda p, q: jnp.sum(kl_divergence(p, q))
    for gradient in jax.grad(total, argnums=(0, 1))(p, p):
        np.testing.assert_allclose(gradient, np.zeros_like(p), atol=2e-6)


def test_kl_divergence_has_both_gradients(logits):
    """dKL/dq = softmax(q) − softmax(p); dKL/dp = p ⊙ (log p − log q − KL)."""
    log_p, log_q = map(log_softmax, logits)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1, keepdims=True)
    total = lambda p, q: jnp.sum(kl_divergence(p, q))
    to_p, to_q = jax.grad(total, argnums=(0, 1))(*single(*logits))
    np.testing.assert_allclose(to_q, np.exp(log_q) - np.exp(log_p), atol=1e-5)
    np.testing.assert_allclose(to_p, np.exp(log_p) * (log_p - log_q - kl), atol=1e-4)


def test_entropy(logits):
    log_p = log_softmax(logits[0])
    expected = -np.sum(np.exp(log_p) * log_p, axis=-1)
    np.testing.assert_allclose(entropy(*single(logits[0])), expected, rtol=1e-5, atol=1e-6)
    uniform = entropy(jnp.full((1, VOCAB), 7.0))
    np.testing.assert_allclose(uniform, np.log(VOCAB), rtol=1e-6)


def test_cross_entropy(logits):
    tokens = np.random.default_rng(2).integers(0, VOCAB, ROWS).astype(np.int32)
    expected = -log_softmax(logits[0])[np.arange(ROWS), tokens]
    found = cross_entropy(*single(logits[0]), jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [kl_divergence, entropy, cross_entropy])
def test_terms_of_logits_are_computed_in_fp32(logits, function):
    (wide,) = single(logits[0])
    narrow = wide.astype(jnp.bfloat16)
    other = {
        kl_divergence: (jnp.zeros_like(narrow),),
        entropy: (),
        cross_entropy: (jnp.zeros(ROWS, jnp.int32),),
    }[function]
    found = function(narrow, *other)
    assert found.dtype == jnp.float32
    same = function(narrow.astype(jnp.float32), *other)
    np.testing.assert_allclose(found, same, rtol=1e-6, atol=1e-6)


def test_direction_error_is_twice_one_minus_cosine(vectors):
    found, wanted = vectors
    cosine = np.sum(found * wanted, axis=-1) / (
        np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    )
    error = direction_error(*single(found, wanted))
    np.testing.assert_allclose(error, 2 * (1 - cosine), atol=2e-6)
    # ‖n(â) − n(a)‖² / d with n(v) = √d v / ‖v‖ is the same number.
    normed = [v * np.sqrt(WIDTH) / np.linalg.norm(v, axis=-1, keepdims=True) for v in vectors]
    direct = np.sum((normed[0] - normed[1]) ** 2, axis=-1) / WIDTH
    np.testing.assert_allclose(error, direct, atol=2e-6)


def test_direction_error_does_not_see_the_size(vectors):
    found, wanted = single(*vectors)
    np.testing.assert_allclose(
        direction_error(100.0 * found, wanted), direction_error(found, wanted), atol=2e-6
    )
    np.testing.assert_allclose(direction_error(found, found), np.zeros(ROWS), atol=2e-6)
    np.testing.assert_allclose(direction_error(-found, found), np.full(ROWS, 4.0), atol=2e-6)


def test_direction_error_at_the_zero_vector():
    """A dead reconstruction has a value and a finite gradient, not NaN."""
    wanted = jnp.ones((2, WIDTH))
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(direction_error(x, wanted)))(
        jnp.zeros((2, WIDTH))
    )
    assert value == 4.0
    assert np.all(np.isfinite(gradient)) and np.all(np.asarray(gradient) < 0)


def test_squared_error(vectors):
    found, wanted = vectors
    expected = np.sum((found - wanted) ** 2, axis=-1) / 3.5
    error = squared_error(*single(found, wanted), jnp.float32(3.5))
    np.testing.assert_allclose(error, expected, rtol=1e-5)


def test_raw_error_is_relative_to_the_mean_square_norm_of_the_training_activations(vectors):
    found, wanted = vectors
    reference = activation_statistics(wanted)
    statistics = {
        "mean": jnp.asarray(reference.mean_D),
        "scale": jnp.asarray(reference.scale, jnp.float32),
    }
    error = reconstruction_error(*single(found, wanted), statistics, "raw")
    expected = np.sum((found - wanted) ** 2, axis=-1) / np.mean(np.sum(wanted**2, axis=-1))
    np.testing.assert_allclose(error, expected, rtol=1e-5)
    direction = reconstruction_error(*single(found, wanted), statistics, "direction")
    np.testing.assert_array_equal(direction, direction_error(*single(found, wanted)))


def test_direction_and_norm_are_the_parts_of_the_relative_squared_error(vectors):
    """‖â − a‖² / ‖a‖² = (r − 1)² + 2 r (1 − cos), with r the ratio of the norms."""
    found, wanted = vectors
    norms = [np.linalg.norm(v, axis=-1) for v in vectors]
    ratio, cos = norms[0] / norms[1], np.sum(found * wanted, axis=-1) / (norms[0] * norms[1])
    relative = np.sum((found - wanted) ** 2, axis=-1) / norms[1] ** 2
    np.testing.assert_allclose((ratio - 1) ** 2 + 2 * ratio * (1 - cos), relative, rtol=1e-9)
    error = reconstruction_error(*single(found, wanted), {}, "direction+norm")
    np.testing.assert_allclose(error, (ratio - 1) ** 2 + 2 * (1 - cos), rtol=1e-4, atol=4e-6)
    zero = jnp.zeros((1, WIDTH))
    gradient = jax.grad(lambda v: reconstruction_error(v, zero + 1, {}, "direction+norm").sum())
    assert np.all(np.isfinite(gradient(zero)))
