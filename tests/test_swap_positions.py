"""The cheap swap against the whole context run again, for every family, layer, position, padding.

``tests/test_original.py`` holds it against ``LanguageModel.swap`` at three positions of one family.
Here the oracle is written by hand (the residual stream replaced between two blocks), P is every
position that the horizon allows, and what is differentiated is a loss: the KL from M's own
predictions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, Case
from tiny_lens import relative_error, tiny_spec
from tiny_models import random_params, random_tokens, tiny_config

from conlens_jax.lens.losses import kl_divergence
from conlens_jax.lens.original import read_context, swapped_logits
from conlens_jax.lens.spec import LensSpec
from conlens_jax.models.families import FAMILIES
from conlens_jax.models.layer_kinds import slice_layers
from conlens_jax.models.transformer import (
    add_position_embeddings,
    embed_tokens,
    positions_of,
    run_part,
    unembed,
)

LENGTH = 9
# (first valid token, one behind the last): no padding, left, right, both.
SPANS = ((0, LENGTH), (3, LENGTH), (0, LENGTH - 2), (2, LENGTH - 1))
VARIANTS = {
    **{family: CASES[family] for family in FAMILIES},
    "llama, tied, biases": Case(
        "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
}


def swaps_of(name: str) -> list[tuple[int, int]]:
    """Layers and horizons: every layer for the plainest; where layers differ, one below which and
    above which they do; elsewhere one."""
    if name == "llama":
        return list(itertools.product((0, 1, 2), (1, 3)))
    if name == "gemma4_text":  # above it one layer has keys, and the others share those or its own
        return [(0, 3)]
    kinds = tiny_config(VARIANTS[name].family, **VARIANTS[name].changes).layer_kinds
    return [(0, 3), (1, 1)] if len(set(kinds)) > 1 else [(1, 3)]


CASES_OF_SWAP = [
    pytest.param(VARIANTS[name], layer, horizon, id=f"{name}-{layer}-{horizon}")
    for name in VARIANTS
    for layer, horizon in swaps_of(name)
]


@functools.cache
def model_of(family: str, changes: tuple):
    # test_experts compares the forms of a mixture of experts; the dense one compiles soonest.
    config = dataclasses.replace(tiny_config(family, **dict(changes)), unroll=1, experts="dense")
    params = random_params(config)
    return config, params | {"embedding": 4 * params["embedding"]}


def spec_of(config, layer: int) -> LensSpec:
    return dataclasses.replace(tiny_spec(layer=layer), model=config)


@functools.cache
def rows_for(horizon: int):
    """(tokens, mask, P), one row for every position of every padding."""
    places = [
        (first, stop, index) for first, stop in SPANS for index in range(first, stop - horizon + 1)
    ]
    place = np.arange(LENGTH)
    mask = np.array([(place >= first) & (place < stop) for first, stop, _ in places])
    tokens = np.where(mask, random_tokens(len(places), LENGTH), 0).astype(np.int32)
    return tokens, mask, np.array([index for *_, index in places], np.int32)


def replaced(params, tokens, mask, indices, vector, layers, config):
    """(logits everywhere, the residual stream at P behind ``layers``), block by block.

    ``layers`` [B] is an array, so that one compiled function serves all; a row with one that the
    model does not have keeps its own stream.
    """
    rows, captured = jnp.arange(len(tokens)), jnp.zeros_like(vector)
    x = embed_tokens(params, tokens, config)
    x = add_position_embeddings(params, x, positions_of(mask), config)
    beside = None
    for number in range(config.n_layers):
        block = slice_layers(params["layers"], number, number + 1)
        x, _, beside = run_part(block, x, positions_of(mask), config=config, beside=beside)
        here = (layers == number)[:, None]
        state = x[rows, indices]
        captured = jnp.where(here, state, captured)
        x = x.at[rows, indices].set(jnp.where(here, vector, state))
    return unembed(params, x, config=config), captured


def twice(tree):
    """Every row a second time: what is computed for both halves is compiled once."""
    return jax.tree.map(lambda array: jnp.concatenate([array, array]), tree)


@functools.partial(jax.jit, static_argnames=("config", "horizon"))
def by_hand(params, tokens, mask, indices, vector, layer, *, config, horizon):
    n = len(tokens)
    inputs = twice((tokens, mask, indices))
    # The second half is the clean run: nothing is replaced.
    layers = jnp.repeat(jnp.stack([layer, jnp.int32(-1)]), n, total_repeat_length=2 * n)
    window = jnp.arange(2 * n)[:, None], inputs[2][:, None] + jnp.arange(horizon)[None]

    def loss(vector):
        logits, captured = replaced(params, *inputs, twice(vector), layers, config)
        swapped, clean = jnp.split(logits[window], 2)
        kl = kl_divergence(jax.lax.stop_gradient(clean), swapped)
        return jnp.sum(kl), (clean, captured[:n], swapped)

    gradient, found = jax.grad(loss, has_aux=True)(vector)
    return *found, gradient


@functools.partial(jax.jit, static_argnames=("spec", "horizon"))
def cheap(params, tokens, mask, indices, vector, *, spec, horizon):
    n = len(tokens)
    # In the second half the captured value is put back.
    context = read_context(params, *twice((tokens, mask, indices)), horizon=horizon, spec=spec)
    captured = context.residual_BhD[:, 0]
    clean = context.logits_BhV[:n]

    def loss(vector):
        vectors = jnp.concatenate([vector, captured[n:]])
        logits, own = jnp.split(swapped_logits(params, context, vectors, spec=spec), 2)
        return jnp.sum(kl_divergence(clean, logits)), (logits, own)

    gradient, (logits, own) = jax.grad(loss, has_aux=True)(vector)
    return clean, captured[:n], logits, gradient, own


@pytest.mark.parametrize(("case", "layer", "horizon"), CASES_OF_SWAP)
def test_swap_at_every_position(case, layer, horizon):
    config, params = model_of(case.family, tuple(case.changes.items()))
    tokens, mask, indices = rows_for(horizon)
    rng = np.random.default_rng(1)
    vector = jnp.asarray(rng.standard_normal((len(tokens), config.d_model)), jnp.float32)
    inputs = (params, tokens, mask, indices, vector)
    spec = spec_of(config, layer)
    *found, own = cheap(*inputs, spec=spec, horizon=horizon)
    expected = by_hand(*inputs, jnp.int32(layer), config=config, horizon=horizon)
    names = ("clean logits", "captured", "swapped logits", "gradient")
    # Row by row: one wrong position would drown in the mean over all of them.
    errors = {
        name: relative_error(list(mine), list(oracle))
        for name, mine, oracle in zip(names, found, expected, strict=True)
    }
    assert max(errors.values()) < 1e-5, errors
    clean, _, swapped, _ = found
    # The captured value put back changes nothing; another vector does, at every position.
    assert relative_error(list(own), list(clean)) < 1e-5
    moved = np.abs(np.asarray(swapped - clean)).max(axis=(1, 2))
    assert moved.min() > 0.01
