"""Every family against transformers' own model as the oracle: states, logits, padding, the cache.

The cases are the rows of ``family_cases.py``.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import CASES, Case, each_case, each_family
from tiny_models import hf_forward, hf_model, random_params, random_tokens, tiny_config

from conlens_jax import LanguageModel, load_model
from conlens_jax.models.layer_kinds import slice_layers
from conlens_jax.models.transformer import (
    add_position_embeddings,
    embed_tokens,
    forward,
    positions_of,
    run_part,
    unembed,
)
from conlens_jax.models.transformer_config import RopeConfig, TransformerConfig

LENGTH = 24
# (first valid token, one behind the last) of each row: no padding, left, right, both.
SPANS = ((0, LENGTH), (7, LENGTH), (0, 17), (5, 20))


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights in transformers and here."""

    oracle: object
    model: LanguageModel


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory):
    """Makes a transformers model and loads its folder; one a case in the session."""
    pytest.importorskip("torch")
    pairs = {}

    def make(case: Case) -> Pair:
        key = repr(case)
        if key not in pairs:
            folder = tmp_path_factory.mktemp("pair")
            oracle = hf_model(case.family, **case.changes)
            oracle.save_pretrained(folder)
            pairs[key] = Pair(oracle, load_model(folder, unroll=1))
        return pairs[key]

    return make


@functools.cache
def padded_rows() -> tuple[np.ndarray, np.ndarray]:
    place = np.arange(LENGTH)
    mask = np.array([(place >= first) & (place < stop) for first, stop in SPANS])
    return np.where(mask, random_tokens(len(SPANS), LENGTH), 0), mask


@functools.partial(jax.jit, static_argnames="config")
def block_by_block(params, embeddings, mask, *, config):
    """The output of every block, each run by itself as a part of the stack."""
    positions, states, beside = positions_of(mask), [], None
    x = add_position_embeddings(params, embeddings, positions, config)
    for number in range(config.n_layers):
        block = slice_layers(params["layers"], number, number + 1)
        x, _, beside = run_part(block, x, positions, config=config, beside=beside)
        states.append(x)
    return jnp.stack(states, axis=1), unembed(params, x, config=config)


@functools.partial(jax.jit, static_argnames="config")
def whole_pass(params, tokens, mask, *, config):
    return forward(params, tokens, config=config, mask_BS=mask)


embed = jax.jit(embed_tokens, static_argnames="config")


def assert_close(ours_BnSD, theirs_BnSD, mask, atol):
    valid = lambda array: np.moveaxis(np.asarray(array), 1, 2)[mask]
    np.testing.assert_allclose(valid(ours_BnSD), valid(theirs_BnSD), rtol=0, atol=atol)


@each_case
def test_every_state_and_the_logits_equal_transformers(make_pair, case):
    """On all valid positions, whatever side the padding is on."""
    pair, (tokens, mask) = make_pair(case), padded_rows()
    logits, hidden = hf_forward(pair.oracle, tokens, mask)
    params, config = pair.model.params, pair.model.config
    embeddings = embed(params, tokens, config=config)
    states, from_parts = block_by_block(params, embeddings, mask, config=config)
    assert_close(states, hidden, mask, case.atol)
    np.testing.assert_allclose(from_parts[mask], logits[mask], rtol=0, atol=case.atol)
    whole = np.asarray(whole_pass(params, tokens, mask, config=config))
    np.testing.assert_allclose(whole[mask], logits[mask], rtol=0, atol=case.atol)
    assert np.isfinite(whole).all(), "padding rows must not turn into NaN: they reach gradients"
    assert np.abs(logits[mask]).max() > 0.1


@each_family
def test_embeddings_go_in_where_transformers_takes_them(make_pair, family):
    case, (_, mask) = CASES[family], padded_rows()
    pair = make_pair(case)
    shape = (*mask.shape, pair.model.config.d_embedding)
    embeddings = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    # transformers' Granite scales the embeddings that it is given; ours are scaled ones.
    given = embeddings / pair.model.config.embedding_scale if family == "granite" else embeddings
    logits, hidden = hf_forward(pair.oracle, None, mask, given)
    inputs = (pair.model.params, embeddings, mask)
    states, ours = block_by_block(*inputs, config=pair.model.config)
    assert_close(states, hidden, mask, case.atol)
    np.testing.assert_allclose(ours[mask], logits[mask], rtol=0, atol=case.atol)


# Fields that say how large something is or how the network is run, and those that cannot be
# switched by themselves because other parameters would be there.
_NOT_SWITCHES = {
    *("family", "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp"),
    *("max_positions", "tied_embeddings", "attention_bias", "mlp_bias", "initializer_range"),
    *("bos_token_id", "eos_token_ids", "dtype", "unroll", "remat", "attention", "n_experts"),
    *("gated_mlp", "pre_norms", "learned_positions", "experts_per_token", "shared_norm"),
    "norm_weights",
    *("position_offset", "d_layer_input", "layer_input_pad"),
    # Seen in 16 bits only.
    "norm_in_fp32",
}


def switches() -> dict[str, tuple[Case, TransformerConfig, TransformerConfig]]:
    """For each value of a switch the first case that has it, and its config with and without."""
    found = {}
    for case in CASES.values():
        config = dataclasses.replace(tiny_config(case.family, **case.changes), unroll=1)
        for field in dataclasses.fields(config):
            value, default = getattr(config, field.name), field.default
            if field.name == "rope" and value is not None:
                default = RopeConfig(original_max_positions=value.original_max_positions)
            if field.name in _NOT_SWITCHES or value == default or (value is None):
                continue
            kind = value.kind if isinstance(value, RopeConfig) else value
            label = f"{field.name}: {kind}" if isinstance(kind, str) else field.name
            without = dataclasses.replace(config, **{field.name: default})
            found.setdefault(label, (case, config, without))
    return found


@pytest.mark.parametrize("label", switches())
def test_every_switch_matters(label):
    """Parity would fail if a switch were forgotten: without it the logits are others."""
    case, config, without = switches()[label]
    params, (tokens, mask) = random_params(config), padded_rows()
    logits, others = (
        np.asarray(whole_pass(params, tokens, mask, config=c)) for c in (config, without)
    )
    assert np.abs(logits - others)[mask].max() > 50 * case.atol


def test_the_text_part_of_a_multimodal_gemma3(tmp_path):
    """Under the names of the hub, as transformers saves it."""
    pytest.importorskip("torch")
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = hf_model("gemma3_text")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, image_token_index=40
    )
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.save_pretrained(tmp_path)
    model = load_model(tmp_path, unroll=1)
    tokens, mask = padded_rows()
    logits, _ = hf_forward(text, tokens, mask)
    ours = np.asarray(whole_pass(model.params, tokens, mask, config=model.config))
    np.testing.assert_allclose(ours[mask], logits[mask], rtol=0, atol=1e-5)
