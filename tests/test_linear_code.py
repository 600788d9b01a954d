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
from conlens_jax.evaluation.studies.probe import linear_map, probe_values

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
    """Against the normal equations, with x and y centred."""
    x = RNG.standard_normal((500, 6)) * np.arange(1, 7) + 2.0
    y = x @ RNG.standard_normal((6, 3)) + RNG.standard_normal(3)
    new = RNG.standard_normal((50, 6))
    centred = x - x.mean(axis=0)
    covariance = centred.T @ centred / len(x)
    for ridge in (1e-9, 1.0):
        penalty = ridge * np.trace(covariance) / 6 * np.eye(6)
        kernel = np.linalg.solve(covariance + penalty, centred.T @ (y - y.mean(axis=0)) / len(x))
        expected = (new - x.mean(axis=0)) @ kernel + y.mean(axis=0)
        np.testing.assert_allclose(linear_map(x, y, ridge)(new), expected, atol=1e-9)


def test_probe_is_the_penalised_minimum():
    """Against Newton's method on the loss as it is written, with whitened x: two values."""
    x = RNG.standard_normal((300, 3)) @ RNG.standard_normal((3, 3))
    noisy = x[:, 0] + RNG.standard_normal(300) > 0
    white = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, ddof=0))).T
    inputs = np.concatenate([white, np.ones((300, 1))], axis=1)
    # Of two classes only the difference of their weights counts; the constant has no penalty.
    penalty, weights = 1e-3 * np.diag([1.0, 1, 1, 0]), np.zeros(4)
    for _ in range(20):
        share = 1 / (1 + np.exp(-inputs @ weights))
        slope = inputs.T @ (share - noisy) / 300 + penalty @ weights
        curvature = (inputs * (share * (1 - share))[:, None]).T @ inputs / 300 + penalty
        weights -= np.linalg.solve(curvature, slope)
    logits = inputs @ weights
    clear = abs(logits) > 0.02
    read = probe_values(x, np.where(noisy, 5, 3), np.array([3, 5]), x)
    np.testing.assert_array_equal(read[clear], np.where(logits > 0, 5, 3)[clear])
    assert clear.sum() > 290


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
    alone = probe_values(x, np.full(900, 9), values, x[:2])
    np.testing.assert_array_equal(alone, [9, 9])
