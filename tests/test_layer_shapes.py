"""Layers of several shapes in one array, and what goes from layer to layer beside the stream:
what the sweeps over all families (``test_parity.py`` and others) do not see of Gemma 4."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import random_params, random_tokens, tiny_config, write_tiny_folder

from conlens_jax.models import layer_shapes
from conlens_jax.models.adapters import init_adapters, with_adapters
from conlens_jax.models.embeddings import as_embedding, embed_tokens, token_table
from conlens_jax.models.families import family_of
from conlens_jax.models.hf_io import load_params, read_config
from conlens_jax.models.param_table import count_params, count_zeros, init_params
from conlens_jax.models.quantized import JoinedTable, matmul, quantise, take_rows, take_rows_bar
from conlens_jax.models.transformer import forward, run_layers, slice_layers

CONFIG = dataclasses.replace(tiny_config("gemma4_text"), unroll=1)
TABLE = {row.path[-1]: row for row in family_of(CONFIG).param_table(CONFIG)}


def test_a_narrow_layer_lies_in_both_halves_of_a_head():
    own = np.arange(1, 9).reshape(2, 4)  # two heads of four
    config = dataclasses.replace(CONFIG, n_heads=2)
    stored = layer_shapes.spread(own, "HX", 0, config)
    assert stored.tolist() == [[1, 2, 0, 0, 3, 4, 0, 0], [5, 6, 0, 0, 7, 8, 0, 0]]
    np.testing.assert_array_equal(layer_shapes.gathered(stored, "HX", 0, config), own)
    # A layer of the whole shape is not copied.
    assert layer_shapes.spread(stored, "HX", 1, config) is stored


def test_numbers_are_counted_without_the_zeros(tmp_path):
    write_tiny_folder(tmp_path, model_type="gemma4_text")
    tensors = load_file(tmp_path / "model.safetensors")
    table = list(TABLE.values())
    assert count_params(table, CONFIG) == sum(tensor.size for tensor in tensors.values())
    # Narrow heads, fewer of them, layers without any; a wide MLP.
    some = [TABLE["key"], TABLE["down"]]
    made = init_params(some, CONFIG, jax.random.key(0))
    zeros = sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(made))
    assert zeros == count_zeros(some, CONFIG) > 0


def test_keys_that_a_layer_does_not_use_may_be_in_its_files(tmp_path):
    """As in the files of the hub."""
    config = write_tiny_folder(tmp_path, model_type="gemma4_text")
    tensors = load_file(tmp_path / "model.safetensors")
    unused = {name.replace("layers.1.", "layers.3."): tensors[name] for name in tensors}
    unused = {name: unused[name] for name in unused if "3.self_attn.k_" in name}
    assert len(unused) == 2 and not unused.keys() & tensors.keys()
    save_file(tensors | unused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    params = load_params(tmp_path, read_config(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, params, random_params(config))
    # In a layer that has keys, or with another name, they are errors as ever.
    more = tensors | {"model.layers.0.self_attn.k_extra.weight": tensors["model.norm.weight"]}
    save_file(more, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.0\.self_attn\.k_extra"):
        load_params(tmp_path, read_config(tmp_path))


def test_adapters_leave_the_zeros_alone():
    """The layers' part that is not their own has no effect with adapters either."""
    config, key = CONFIG, jax.random.key(0)
    targets = ("query", "key", "value", "attention_out", "gate", "up", "down")
    adapters = init_adapters(config, config.n_layers, targets, 2, key)
    params, tokens = random_params(config), random_tokens(2, 9)
    draw = lambda leaf: 0.1 * jax.random.normal(key, leaf.shape)
    adapters = {
        name: {"in": pair["in"], "out": jnp.where(_outputs(name), draw(pair["out"]), 0)}
        for name, pair in adapters.items()
    }

    @jax.jit
    def loss(adapters):
        layers = with_adapters(params["layers"], adapters, jnp.float32(1.0))
        return jnp.sum(jnp.square(forward(params | {"layers": layers}, tokens, config=config)))

    for name, bars in jax.grad(loss)(adapters).items():
        assert not np.asarray(bars["out"])[
            ~np.broadcast_to(_outputs(name), bars["out"].shape)
        ].any()
        inputs = layer_shapes.used_mask(TABLE[name].matrix_dims[0], range(config.n_layers), config)
        assert inputs is None or not np.asarray(bars["in"])[~inputs].any(), name


def _outputs(name: str) -> np.ndarray:
    """Which outputs of an adapter are the layer's own, [N, 1, *outputs]."""
    row = TABLE[name]
    mask = layer_shapes.used_mask(row.matrix_dims[1], row.layers_of(CONFIG), CONFIG)
    return np.ones(1, bool) if mask is None else mask[:, None]


def test_a_vector_has_the_inputs_of_the_pad_token():
    """transformers gives the places of an image the pad token's row of the second table."""
    params = random_params(CONFIG)
    vector = jnp.arange(CONFIG.d_model, dtype=jnp.float32)
    pad = embed_tokens(params, jnp.int32(3), CONFIG)
    embedding = as_embedding(params, jnp.stack([vector, 2 * vector]), CONFIG)
    np.testing.assert_array_equal(embedding[:, : CONFIG.d_model], [vector, 2 * vector])
    np.testing.assert_array_equal(embedding[:, CONFIG.d_model :], [pad[CONFIG.d_model :]] * 2)


def test_two_tables_are_used_as_one():
    params = random_params(CONFIG)
    table = token_table(params)
    whole = jnp.concatenate([params["embedding"], params["layer_embedding"]], axis=1)
    assert table.shape == whole.shape and table.T.shape == whole.T.shape
    rng = np.random.default_rng(0)
    tokens = jnp.asarray([[4, 7, 4]])
    for x, mine, oracle in (
        (rng.standard_normal((2, 3, 48)), table, whole),
        (rng.standard_normal((2, 3, CONFIG.d_embedding)), table.T, whole.T),
    ):
        x = x.astype(np.float32)
        np.testing.assert_allclose(matmul(x, mine), x @ oracle, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(take_rows(table, tokens), whole[tokens])
    bar = jnp.asarray(rng.standard_normal((1, 3, CONFIG.d_embedding)), jnp.float32)
    found = jnp.concatenate(take_rows_bar(table, tokens, bar).parts, axis=1)
    np.testing.assert_array_equal(found, jnp.zeros_like(whole).at[tokens].add(bar))
    narrow = JoinedTable(tuple(quantise(part, (1,)) for part in table.parts))
    np.testing.assert_allclose(take_rows(narrow, tokens), whole[tokens], rtol=0, atol=2e-3)


def test_int8_keeps_the_logits(tmp_path):
    config = write_tiny_folder(tmp_path, model_type="gemma4_text")
    exact, tokens = random_params(config), random_tokens(2, 9)
    narrow = dataclasses.replace(config, quantise="int8", unroll=1)
    params = load_params(tmp_path, narrow)
    run = jax.jit(forward, static_argnames="config")
    logits = run(params, tokens, config=narrow)
    expected = run(exact, tokens, config=dataclasses.replace(config, unroll=1))
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.03


def test_upper_layers_alone_need_what_is_beside_them():
    upper = slice_layers(random_params(CONFIG)["layers"], 2, 4)
    x, positions = jnp.zeros((1, 3, CONFIG.d_embedding)), jnp.arange(3)[None]
    with pytest.raises(ValueError, match="layers from 2 on need what is beside their input"):
        run_layers(upper, x, positions, config=CONFIG)
    with pytest.raises(ValueError, match="32 wide, not 56"):
        forward(
            {**random_params(CONFIG), "layer_embedding": jnp.zeros((48, 0))},
            x[..., 0].astype(int),
            config=CONFIG,
        )
