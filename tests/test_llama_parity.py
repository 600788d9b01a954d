"""The Llama port against transformers' ``LlamaForCausalLM`` as the oracle."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import hf_forward, hf_model, random_params, random_tokens, tiny_config

from conlens_jax import LanguageModel, load_model
from conlens_jax.models.cache import empty_cache
from conlens_jax.models.layer_kinds import NO_POSITION
from conlens_jax.models.transformer import (
    embed_tokens,
    forward,
    run_layers,
    unembed,
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "grouped heads": {"num_hidden_layers": 3},
    "one key-value head, tied, gelu_tanh": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "biases, narrow heads, gelu": {
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 6,
        "hidden_act": "gelu",
    },
    "wide heads, relu": {"head_dim": 12, "num_key_value_heads": 4, "hidden_act": "relu"},
}
# head_dim 16 gives 8 frequencies, so that each scaling has some to keep and some to stretch.
ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn with its options": YARN
    | {"attention_factor": 0.7, "beta_fast": 3.0, "beta_slow": 0.5, "truncate": False},
}
LENGTH = 24


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights in transformers and here."""

    oracle: object
    model: LanguageModel


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory):
    """Makes a transformers model and loads its folder; one a configuration in the session."""
    pytest.importorskip("torch")
    pairs = {}

    def make(**changes) -> Pair:
        key = repr(sorted(changes.items()))
        if key not in pairs:
            folder = tmp_path_factory.mktemp("pair")
            oracle = hf_model(**changes)
            oracle.save_pretrained(folder)
            pairs[key] = Pair(oracle, load_model(folder, unroll=1))
        return pairs[key]

    return make


def assert_parity(pair: Pair, tokens, mask=None, atol=1e-5):
    """Every block's output, and the logits made of the last one, agree on all valid positions."""
    logits, hidden = hf_forward(pair.oracle, tokens, mask)
    valid = np.ones(tokens.shape, bool) if mask is None else mask
    model = pair.model
    captured = model.capture(tokens, range(model.config.n_layers), None, mask)
    np.testing.assert_allclose(_valid(captured, valid), _valid(hidden, valid), rtol=0, atol=atol)
    ours = np.asarray(unembed(model.params, captured[:, -1], config=model.config))
    np.testing.assert_allclose(ours[valid], logits[valid], rtol=0, atol=atol)


def _valid(hidden_BnSD, valid_BS):
    return np.moveaxis(np.asarray(hidden_BnSD), 1, 2)[valid_BS]


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_every_hidden_state_equals_transformers(make_pair, changes):
    assert_parity(make_pair(**{"num_hidden_layers": 2} | changes), random_tokens(2, LENGTH))


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rope_kinds_equal_transformers(make_pair, rope):
    shape = {"head_dim": 16, "num_hidden_layers": 2}
    if rope["rope_type"] == "dynamic":
        shape["max_position_embeddings"] = 16
    pair = make_pair(**shape, rope_parameters={"rope_theta": 10_000.0} | rope)
    tokens = random_tokens(2, 40)
    assert_parity(pair, tokens)
    # The kind matters at this length: the same weights with plain rope give other logits.
    plain, _ = hf_forward(hf_model(**shape), tokens)
    logits, _ = hf_forward(pair.oracle, tokens)
    assert np.abs(plain - logits).max() > 0.05
    if rope["rope_type"] == "dynamic":  # and nothing is stretched within the trained length
        assert_parity(pair, tokens, np.broadcast_to(np.arange(40) < 12, tokens.shape))


def test_logits_equal_transformers(make_pair):
    pair = make_pair(num_hidden_layers=3)
    tokens = random_tokens(2, LENGTH)
    logits, _ = hf_forward(pair.oracle, tokens)
    np.testing.assert_allclose(pair.model.logits(tokens), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(make_pair, side):
    pair = make_pair(num_hidden_layers=3)
    texts, lengths = random_tokens(2, LENGTH, seed=1), np.array([17, 5])
    counted = np.arange(LENGTH)[None]
    mask = counted < lengths[:, None] if side == "right" else counted >= LENGTH - lengths[:, None]
    tokens = np.zeros_like(texts)
    for row, length in enumerate(lengths):
        tokens[row, mask[row]] = texts[row, :length]
    assert_parity(pair, tokens, mask)
    unpadded, padded = pair.model.logits(texts), np.asarray(pair.model.logits(tokens, mask))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            padded[row][mask[row]], unpadded[row, :length], rtol=0, atol=1e-5
        )
    assert np.isfinite(padded).all(), "padding rows must not turn into NaN: they reach gradients"


def test_bfloat16_weights_run(make_pair):
    pair = make_pair(num_hidden_layers=3)
    tokens = random_tokens(2, LENGTH)
    model = load_model(pair.model.folder, dtype="bfloat16", unroll=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    logits = model.logits(tokens)
    captured = model.capture(tokens, 2, None)
    assert (logits.dtype, captured.dtype) == (jnp.float32, jnp.bfloat16)
    exact, _ = hf_forward(pair.oracle, tokens)
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03


# --- the key-value cache, remat and unrolling, against the plain forward pass ---------------------


@pytest.fixture(scope="module")
def tiny():
    config = tiny_config(num_hidden_layers=2, rope_parameters=LLAMA3 | {"rope_theta": 1e4})
    params = random_params(config)
    tokens = random_tokens(3, 12)
    expected = jax.jit(functools.partial(forward, config=config))(params, tokens)

    @jax.jit
    def step(tokens_BS, positions_BS, cache, slot):
        x_BSD = embed_tokens(params, tokens_BS, config)
        x_BSD, cache = run_layers(
            params["layers"], x_BSD, positions_BS, config=config, cache=cache, slot=slot
        )
        return unembed(params, x_BSD, config=config), cache

    return config, params, tokens, np.asarray(expected), step


def test_prefill_and_decode_equal_the_whole_pass(tiny):
    config, _, tokens, expected, step = tiny
    batch, length = tokens.shape
    prefix = 7
    cache = empty_cache(config, config.n_layers, batch, length + 2)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    logits, cache = step(tokens[:, :prefix], positions[:, :prefix], cache, jnp.int32(0))
    np.testing.assert_allclose(logits, expected[:, :prefix], rtol=0, atol=1e-5)
    for t in range(prefix, length):
        logits, cache = step(tokens[:, t : t + 1], positions[:, t : t + 1], cache, jnp.int32(t))
        np.testing.assert_allclose(logits[:, 0], expected[:, t], rtol=0, atol=1e-5)
    unused = np.asarray(cache.positions_BC)[:, length:]
    assert (unused == NO_POSITION).all()


def test_decode_with_a_slot_for_each_row(tiny):
    """Rows of different prompt lengths, padded on the right; each goes on behind its own end."""
    config, _, tokens, expected, step = tiny
    batch, lengths = tokens.shape[0], np.array([7, 4, 2])
    valid = np.arange(7)[None] < lengths[:, None]
    positions = np.where(valid, np.arange(7)[None], NO_POSITION).astype(np.int32)
    cache = empty_cache(config, config.n_layers, batch, 12)
    logits, cache = step(np.where(valid, tokens[:, :7], 0), positions, cache, jnp.int32(0))
    np.testing.assert_allclose(np.asarray(logits)[valid], expected[:, :7][valid], rtol=0, atol=1e-5)
    rows = np.arange(batch)
    for _ in range(5):
        logits, cache = step(
            tokens[rows, lengths][:, None],
            lengths[:, None].astype(np.int32),
            cache,
            lengths.astype(np.int32),
        )
        np.testing.assert_allclose(logits[:, 0], expected[rows, lengths], rtol=0, atol=1e-5)
        lengths = lengths + 1


def test_the_kept_cache_is_the_written_one(tiny):
    config, params, tokens, _, step = tiny
    batch, length = tokens.shape
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    _, written = step(
        tokens, positions, empty_cache(config, config.n_layers, batch, length), jnp.int32(0)
    )
    run = jax.jit(functools.partial(run_layers, config=config, keep_cache=True))
    _, kept = run(params["layers"], embed_tokens(params, tokens, config), positions)
    assert kept.keys.shape == (2, batch, length, config.n_kv_heads, config.head_dim)
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
