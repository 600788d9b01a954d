"""The backward pass by hand, at once and token by token, against autodiff, for every family."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from family_cases import each_family
from tiny_models import random_params, tiny_config

from conlens_jax.models.backward import TokenVjp, forward_with_residuals, layers_vjp
from conlens_jax.models.families import family_of
from conlens_jax.models.transformer import positions_of, run_layers

BATCH, LENGTH = 2, 12
# The tokens from here on are visited one by one; the earlier ones are a prompt.
FIRST = 4


@functools.partial(jax.jit, static_argnames="config")
def by_hand(layers, x, out_bar, positions, *, config):
    _, residuals = forward_with_residuals(layers, x, positions, config=config)
    layers_bar, x_bar, _ = layers_vjp(layers, residuals, out_bar, positions, config=config)
    visit = TokenVjp(layers, residuals, positions, FIRST, config)

    def back(later, token):
        token_bar, later = visit(token, out_bar[:, FIRST + token], later)
        return later, token_bar

    tokens = jnp.arange(LENGTH - FIRST)
    _, tokens_bar = jax.lax.scan(back, visit.start(), tokens, reverse=True)
    return layers_bar, x_bar, tokens_bar.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames="config")
def by_autodiff(layers, x, out_bar, positions, *, config):
    run = lambda layers, x: run_layers(layers, x, positions, config=config)[0]
    _, pull = jax.vjp(run, layers, x)
    layers_bar, x_bar = pull(out_bar)
    return layers_bar, x_bar, x_bar[:, FIRST:]


@each_family
def test_backward_by_hand_equals_autodiff(family):
    config = dataclasses.replace(tiny_config(family), unroll=1)
    # One row of two has padding on both sides.
    place = np.arange(LENGTH)
    positions = positions_of(jnp.asarray([place >= 0, (place > 1) & (place < LENGTH - 1)]))
    rng = np.random.default_rng(1)
    shapes = ((BATCH, LENGTH, width) for width in (config.d_embedding, config.d_model))
    x, out_bar = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    # Nothing is asked of padding.
    out_bar[1, [0, 1, -1]] = 0
    inputs = (random_params(config)["layers"], x, out_bar, positions)
    found, expected = by_hand(*inputs, config=config), by_autodiff(*inputs, config=config)

    def compare(found, expected):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * scale)

    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(compare, found, expected)
    for row in family_of(config).param_table(config):
        if (used := row.used_mask(config)) is not None:
            zeros = np.asarray(found[0][row.path[-1]])[~used]
            assert not zeros.any(), "what fills a smaller layer's place must stay zero"
