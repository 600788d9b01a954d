"""The cheap swap against the full forward pass, at every kind of position and padding."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import captured, relative_error, tiny_original, tiny_spec
from tiny_models import random_tokens

from conlens_jax.lens.original import read_context, swapped_logits
from conlens_jax.models.model import LanguageModel

LENGTH, PAD, LAYERS = 10, 3, 3
HORIZONS = (1, 3)
CASES = [(0, 3), (1, 1), (1, 3), (2, 1), (2, 3)]


@pytest.fixture(scope="module")
def model():
    spec = tiny_spec()
    return LanguageModel(spec.model, tiny_original(spec), Path(), "tiny", "")


def rows_for(horizon: int):
    """(tokens, mask, P): the first, a middle and the last valid P under each kind of padding."""
    paddings = {"none": (0, LENGTH), "left": (PAD, LENGTH), "right": (0, LENGTH - PAD)}
    spans, indices = [], []
    for first, stop in paddings.values():
        for index in (first, (first + stop) // 2 - 1, stop - horizon):
            spans.append((first, stop))
            indices.append(index)
    place = np.arange(LENGTH)
    mask = np.array([(place >= first) & (place < stop) for first, stop in spans])
    tokens = np.where(mask, random_tokens(len(spans), LENGTH), 0).astype(np.int32)
    return tokens, mask, np.array(indices, np.int32)


@functools.partial(jax.jit, static_argnames=("spec", "horizon"))
def cheap(params, tokens, mask, indices, vector, cotangent, *, spec, horizon):
    context = read_context(params, tokens, mask, indices, horizon=horizon, spec=spec)
    run = lambda vector: swapped_logits(params, context, vector, spec=spec)
    logits, pull = jax.vjp(run, vector)
    return context, logits, pull(cotangent)[0]


@functools.partial(jax.jit, static_argnames="layer")
def full(params, vectors, cotangents, *, layer):
    """The same through ``LanguageModel.swap``, all horizons in one batch."""
    model = LanguageModel(tiny_spec().model, params, Path(), "tiny", "")
    tokens, mask, indices = map(np.concatenate, zip(*map(rows_for, HORIZONS), strict=True))
    run = lambda vector: model.swap(tokens, layer, indices, vector, mask)
    logits, pull = jax.vjp(run, vectors)
    return logits, pull(cotangents)[0]


def everywhere(cotangent, horizon):
    """A cotangent of the logits at P..P+h−1 as one of the logits at all positions."""
    tokens, _, indices = rows_for(horizon)
    wide = np.zeros((*tokens.shape, cotangent.shape[-1]), np.float32)
    wide[np.arange(len(tokens))[:, None], indices[:, None] + np.arange(horizon)] = cotangent
    return wide


@functools.cache
def full_results(layer: int):
    """For each horizon (logits at P..P+h−1, gradient)."""
    inputs = [arrays(horizon) for horizon in HORIZONS]
    vectors = np.concatenate([vector for vector, _ in inputs])
    wide = [everywhere(c, h) for (_, c), h in zip(inputs, HORIZONS, strict=True)]
    params = tiny_original(tiny_spec())
    logits, gradients = full(params, vectors, np.concatenate(wide), layer=layer)
    results = {}
    for number, horizon in enumerate(HORIZONS):
        indices = rows_for(horizon)[2]
        rows = len(indices) * number + np.arange(len(indices))
        window = indices[:, None] + np.arange(horizon)
        results[horizon] = logits[rows[:, None], window], gradients[rows]
    return results


def arrays(horizon: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    n = len(rows_for(horizon)[0])
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return draw(n, 32), draw(n, horizon, 48)


@pytest.mark.parametrize(("layer", "horizon"), CASES)
def test_swap_and_its_gradient_equal_the_full_forward(model, layer, horizon):
    tokens, mask, indices = rows_for(horizon)
    vector, cotangent = arrays(horizon)
    _, logits, gradient = cheap(
        model.params,
        tokens,
        mask,
        indices,
        vector,
        cotangent,
        spec=tiny_spec(layer=layer),
        horizon=horizon,
    )
    expected, expected_gradient = full_results(layer)[horizon]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=3e-5)
    assert relative_error(list(gradient), list(expected_gradient)) < 1e-5


@pytest.mark.parametrize(("layer", "horizon"), CASES)
def test_swapping_in_the_captured_value_changes_no_logit(model, layer, horizon):
    tokens, mask, indices = rows_for(horizon)
    vector, cotangent = arrays(horizon)
    spec = tiny_spec(layer=layer)
    states = captured(model.params, tokens, mask, spec=spec)[np.arange(len(tokens)), indices]
    inputs = (model.params, tokens, mask, indices)
    context, logits, _ = cheap(*inputs, states, cotangent, spec=spec, horizon=horizon)
    np.testing.assert_array_equal(context.residual_BhD[:, 0], states)
    np.testing.assert_allclose(logits, context.logits_BhV, rtol=0, atol=2e-5)
    clean = np.asarray(model.logits(tokens, mask))
    window = np.asarray(indices)[:, None] + np.arange(horizon)
    np.testing.assert_allclose(
        context.logits_BhV, clean[np.arange(len(tokens))[:, None], window], rtol=0, atol=2e-5
    )
    # The same comparison sees another vector, in every row.
    _, moved, _ = cheap(*inputs, vector, cotangent, spec=spec, horizon=horizon)
    assert np.abs(np.asarray(moved - logits))[:, 0].max(axis=-1).min() > 0.05


@pytest.mark.parametrize("layer", range(LAYERS))
def test_capture_equals_that_of_the_whole_model(model, layer):
    tokens, mask, _ = rows_for(1)
    states = np.asarray(captured(model.params, tokens, mask, spec=tiny_spec(layer=layer)))
    expected = np.asarray(model.capture(tokens, layer, None, mask))
    np.testing.assert_allclose(states[mask], expected[mask], rtol=0, atol=1e-5)
