"""The cache, remat, unrolling and 16 bits, against the plain forward pass in fp32.

That the plain pass is each family's own is in ``test_parity.py``.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import each_family
from tiny_models import empty_cache, random_params, random_tokens, tiny_config

from conlens_jax.models.layer_kinds import NO_POSITION
from conlens_jax.models.transformer import (
    add_position_embeddings,
    embed_tokens,
    forward,
    run_layers,
    unembed,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@functools.partial(jax.jit, static_argnames="config")
def step_of(params, tokens_BS, positions_BS, cache, slot, *, config):
    """Logits of new tokens and the cache with them."""
    x_BSD = embed_tokens(params, tokens_BS, config)
    x_BSD = add_position_embeddings(params, x_BSD, positions_BS, config)
    x_BSD, cache = run_layers(
        params["layers"], x_BSD, positions_BS, config=config, cache=cache, slot=slot
    )
    return unembed(params, x_BSD, config=config), cache


whole_pass = jax.jit(forward, static_argnames="config")


@each_family
def test_decode_with_a_slot_for_each_row_equals_the_whole_pass(family):
    """Rows of different prompt lengths, padded on the right; each goes on behind its own end. The
    prompts are longer than a window, and so is what is written."""
    config = dataclasses.replace(tiny_config(family), unroll=1)
    params, tokens = random_params(config), random_tokens(3, 16)
    expected = np.asarray(whole_pass(params, tokens, config=config))
    step = functools.partial(step_of, config=config)
    batch, lengths = tokens.shape[0], np.array([9, 7, 2])
    valid = np.arange(9)[None] < lengths[:, None]
    positions = np.where(valid, np.arange(9)[None], NO_POSITION).astype(np.int32)
    cache = empty_cache(config, batch, 16)
    prompts = np.where(valid, tokens[:, :9], 0)
    logits, cache = step(params, prompts, positions, cache, jnp.int32(0))
    np.testing.assert_allclose(np.asarray(logits)[valid], expected[:, :9][valid], rtol=0, atol=1e-5)
    rows = np.arange(batch)
    for _ in range(7):
        new = tokens[rows, lengths][:, None], lengths[:, None].astype(np.int32)
        logits, cache = step(params, *new, cache, lengths.astype(np.int32))
        np.testing.assert_allclose(logits[:, 0], expected[rows, lengths], rtol=0, atol=1e-5)
        lengths = lengths + 1


@each_family
def test_bfloat16_weights_run(family):
    config = dataclasses.replace(tiny_config(family), unroll=1)
    params, tokens = random_params(config), random_tokens(2, 12)
    exact = whole_pass(params, tokens, config=config)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits = whole_pass(narrow, tokens, config=dataclasses.replace(config, dtype="bfloat16"))
    assert logits.dtype == jnp.float32
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05


@pytest.fixture(scope="module")
def tiny():
    config = tiny_config(num_hidden_layers=2, rope_parameters=LLAMA3)
    params = random_params(config)
    tokens = random_tokens(3, 12)
    expected = jax.jit(functools.partial(forward, config=config))(params, tokens)

    step = functools.partial(step_of, params, config=config)
    return config, params, tokens, np.asarray(expected), step


def test_prefill_and_decode_equal_the_whole_pass(tiny):
    config, _, tokens, expected, step = tiny
    batch, length = tokens.shape
    prefix = 7
    cache = empty_cache(config, batch, length + 2)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    logits, cache = step(tokens[:, :prefix], positions[:, :prefix], cache, jnp.int32(0))
    np.testing.assert_allclose(logits, expected[:, :prefix], rtol=0, atol=1e-5)
    for t in range(prefix, length):
        logits, cache = step(tokens[:, t : t + 1], positions[:, t : t + 1], cache, jnp.int32(t))
        np.testing.assert_allclose(logits[:, 0], expected[:, t], rtol=0, atol=1e-5)
    unused = np.asarray(cache.positions_BC)[:, length:]
    assert (unused == NO_POSITION).all()


def test_the_kept_cache_is_the_written_one(tiny):
    config, params, tokens, _, step = tiny
    batch, length = tokens.shape
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    _, written = step(tokens, positions, empty_cache(config, batch, length), jnp.int32(0))
    run = jax.jit(functools.partial(run_layers, config=config, keep_cache=True))
    _, kept = run(params["layers"], embed_tokens(params, tokens, config), positions)
    assert kept.keys.shape == (2, batch, config.n_kv_heads, length, config.head_dim)
    for ours, theirs in zip(kept, written, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_remat_and_scan_change_no_number(tiny):
    config, params, tokens, _, _ = tiny
    assert (config.remat, config.unroll) == ("none", 0)
    expected = _loss_and_gradient(params, tokens, config)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected))
    scanned = dataclasses.replace(config, remat="full", unroll=1)
    actual = _loss_and_gradient(params, tokens, scanned)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), actual, expected
    )
    products = _loss_and_gradient(params, tokens, dataclasses.replace(scanned, remat="products"))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), products, expected
    )
    # The two are not the same program: only one recomputes its layers.
    programs = [str(_loss_and_gradient.trace(params, tokens, c).jaxpr) for c in (config, scanned)]
    assert ["remat" in program or "checkpoint" in program for program in programs] == [False, True]


@functools.partial(jax.jit, static_argnums=2)
def _loss_and_gradient(params, tokens, config):
    def loss(params):
        return jnp.mean(jnp.square(forward(params, tokens, config=config)))

    return jax.value_and_grad(loss)(params)
