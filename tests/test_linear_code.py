"""Linear maps and the linear code: they find what is linear, and count their bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from conlens_jax.evaluation.studies.linear_code import (
    LinearCode,
    allocate_bits,
    bits_of_text,
    lloyd_levels,
)
from conlens_jax.evaluation.studies.probe import LinearMap, logistic_regression, probe_values

RNG = np.random.default_rng(0)


def test_bits_of_a_text():
    assert bits_of_text(8, 1024) == 80
    assert bits_of_text(4, 320) == 33


def test_allocation_is_the_best_of_all():
    """Against every way to give out five bits, under the same law of errors."""
    variances = np.array([10.0, 3.0, 0.5])
    error = lambda bits: float(np.sum(variances / 4.0 ** np.asarray(bits)))
    every = [bits for bits in itertools.product(range(6), repeat=3) if sum(bits) == 5]
    assert error(allocate_bits(variances, 5)) == pytest.approx(min(map(error, every)))


def test_levels_beat_equal_quantiles_and_match_the_gaussian_quantiser():
    """Max (1960): the best 2-bit quantiser of a Gaussian has error 0.1175."""
    values = RNG.standard_normal(40_000)
    levels = lloyd_levels(values, 4)
    error = np.min((values[:, None] - levels) ** 2, axis=1).mean()
    assert error == pytest.approx(0.1175, rel=0.03)
    np.testing.assert_allclose(levels, [-1.51, -0.4528, 0.4528, 1.51], atol=0.05)


def test_more_bits_less_error_and_no_more_codes_than_bits():
    """Gaussian data with known variances: at high rates close to the rate-distortion bound."""
    scales = np.array([4.0, 2.0, 1.0, 0.05])
    rotation = np.linalg.qr(RNG.standard_normal((4, 4)))[0]
    data = (RNG.standard_normal((20_000, 4)) * scales) @ rotation + 3.0
    train, held_out = data[:10_000], data[10_000:]
    errors = []
    for n_bits in (0, 1, 4, 12):
        code = LinearCode.fit(train, n_bits)
        assert code.bits == n_bits
        back = code(held_out)
        assert len(np.unique(back, axis=0)) <= 2**n_bits
        errors.append(np.sum((back - held_out) ** 2, axis=1).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(np.sum(scales**2), rel=0.05)
    # Three components share 12 bits, the fourth has none: D(R) by water-filling. Scalar
    # quantisers need 2.7 times that where they are fine (Panter and Dite, 1951).
    bound = 3 * 64 ** (1 / 3) * 4.0**-4 + scales[-1] ** 2
    assert bound < errors[-1] < 3.3 * bound


def test_linear_map_is_found_and_the_penalty_shrinks_it():
    x = RNG.standard_normal((500, 6)) + 2.0
    kernel, bias = RNG.standard_normal((6, 3)), RNG.standard_normal(3)
    found = LinearMap.fit(x, x @ kernel + bias, ridge=1e-9)
    new = RNG.standard_normal((50, 6))
    np.testing.assert_allclose(found(new), new @ kernel + bias, atol=1e-6)
    shrunk = LinearMap.fit(x, x @ kernel + bias, ridge=1.0)
    assert np.linalg.norm(shrunk.kernel_DK) < 0.8 * np.linalg.norm(kernel)


def test_logistic_regression_is_at_its_minimum():
    """The gradient, by finite differences of the loss as it is written, vanishes."""
    x = np.concatenate([RNG.standard_normal((300, 4)), np.ones((300, 1))], axis=1)
    one_hot = np.eye(3)[RNG.integers(3, size=300)]
    found = logistic_regression(x, one_hot)

    def loss(kernel):
        logits = x @ kernel
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -(one_hot * log_p).sum(axis=1).mean() + 0.5e-3 * np.sum(kernel**2)

    for index in np.ndindex(found.shape):
        nudge = np.zeros_like(found)
        nudge[index] = 1e-4
        slope = (loss(found + nudge) - loss(found - nudge)) / 2e-4
        assert abs(slope) < 1e-4
    assert np.linalg.norm(found) > 0.01


def test_probe_reads_what_is_there_and_only_that():
    values = np.array([7, 9, 30])
    labels = values[RNG.integers(3, size=900)]
    directions = RNG.standard_normal((31, 16))
    x = directions[labels] + 0.3 * RNG.standard_normal((900, 16))
    labels_with_gaps = np.where(np.arange(900) % 2, labels, -1)
    read = probe_values(x[:600], labels_with_gaps[:600], values, x[600:])
    assert np.mean(read == labels[600:]) > 0.98
    noise = RNG.standard_normal((900, 16))
    read = probe_values(noise[:600], labels[:600], values, noise[600:])
    assert np.mean(read == labels[600:]) < 0.5
    nothing = probe_values(x, np.full(900, -1), values, x[:2])
    np.testing.assert_array_equal(nothing, [-1, -1])
