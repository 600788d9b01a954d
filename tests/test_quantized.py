"""int8 against the same numbers as floats: products, gradients, the whole lens; and its memory."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora import lora_spec
from tiny_lens import relative_error, tiny_batch, tiny_lens, tiny_noise, tiny_spec
from tiny_models import random_params, random_tokens, tiny_config, write_tiny_folder

from conlens_jax.config import (
    ConfigError,
    ExperimentConfig,
    MeshConfig,
    from_config_dict,
    to_config_dict,
)
from conlens_jax.lens.decoder import decoder_head, generate
from conlens_jax.lens.encoder import encode_tokens
from conlens_jax.lens.history import text_states
from conlens_jax.lens.spec import decoder_of, encoder_of
from conlens_jax.models.adapters import init_adapters, low_rank
from conlens_jax.models.families import family_of
from conlens_jax.models.hf_io import load_params, read_config, save_model
from conlens_jax.models.param_table import abstract_params, leaf
from conlens_jax.models.quantized import Int8Matrix, einsum, matmul, quantise, take_rows
from conlens_jax.models.sharding import bytes_per_device, loading_report, param_shardings
from conlens_jax.models.transformer import all_positions, forward, run_layers
from conlens_jax.parallel.mesh import make_mesh


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def quantised_tree(params, config):
    """What loading makes of the parameters."""
    tree = jax.tree.map(lambda leaf: leaf, params)
    for row in family_of(config).param_table(config):
        if row.scale_dims:
            inputs = tuple(axis for axis, dim in enumerate(row.scale_dims) if dim == "1")
            *path, last = row.path
            leaf(tree, path)[last] = quantise(leaf(params, row.path), inputs)
    return tree


def as_floats(tree):
    is_int8 = lambda node: isinstance(node, Int8Matrix)
    return jax.tree.map(
        lambda node: node.astype(node.dtype) if is_int8(node) else node, tree, is_leaf=is_int8
    )


# --- one matrix ---------------------------------------------------------------------------------


def test_each_output_is_rounded_by_its_own_scale():
    matrix = normal(0, 64, 5) * jnp.asarray([[1e-4, 1.0, 50.0, 0.0, 3.0]], jnp.float32)
    rounded = quantise(matrix, (0,))
    assert rounded.values.dtype == jnp.int8 and rounded.scale.shape == (1, 5)
    error = jnp.max(jnp.abs(rounded.astype("float32") - matrix), axis=0)
    assert np.all(error <= 0.501 * rounded.scale[0])
    assert np.all(np.max(np.abs(rounded.values), axis=0) == [127, 127, 127, 0, 127])
    # One scale for all would lose the small output entirely.
    np.testing.assert_allclose(rounded.astype("float32")[:, 0], matrix[:, 0], atol=2e-6)


EQUATIONS = {
    "query": ("bsd,dhx->bshx", (2, 3, 32), (32, 4, 8), (0,)),
    "attention_out": ("bshx,hxd->bsd", (2, 3, 4, 8), (4, 8, 32), (0, 1)),
    "expert up": ("bsd,edf->bsef", (2, 3, 32), (3, 32, 40), (1,)),
    "expert down": ("bsef,efd->bsed", (2, 3, 3, 40), (3, 40, 32), (1,)),
    "table as head": ("bd,vd->bv", (2, 32), (48, 32), (1,)),
    "weighted rows": ("bv,vd->bd", (2, 48), (48, 32), (1,)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EQUATIONS)
def test_products_and_their_gradient(name, dtype):
    equation, x_shape, shape, inputs = EQUATIONS[name]
    x, matrix = normal(1, *x_shape, dtype=dtype), quantise(normal(2, *shape, dtype=dtype), inputs)
    plain = functools.partial(jnp.einsum, equation)
    ours, pull = jax.vjp(lambda x: einsum(equation, x, matrix), x)
    wide = matrix.astype("float32")
    expected, expected_pull = jax.vjp(lambda x: plain(x, wide), x.astype("float32"))
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    assert ours.dtype == x.dtype
    assert relative_error(ours.astype("float32"), expected) < tolerance
    bar = normal(3, *ours.shape, dtype=dtype)
    found, wanted = pull(bar)[0], expected_pull(bar.astype("float32"))[0]
    assert found.dtype == x.dtype
    assert relative_error(found.astype("float32"), wanted) < tolerance
    # Forward mode too: a product that is recalled in a hand-written backward pass needs it.
    moved = jax.jvp(lambda x: einsum(equation, x, matrix), (x,), (x,))[1]
    assert relative_error(moved.astype("float32"), expected) < tolerance


def test_rows_of_a_table_and_its_transpose():
    table = quantise(normal(0, 48, 32), (1,))
    tokens = jnp.asarray([[3, 47], [0, 3]])
    np.testing.assert_array_equal(take_rows(table, tokens), table.astype("float32")[tokens])
    x = normal(1, 2, 3, 32)
    assert relative_error(matmul(x, table.T), x @ table.astype("float32").T) < 1e-6


def test_adapters_of_experts():
    x, down_in, down_out = normal(0, 2, 3, 3, 40), normal(1, 3, 40, 5), normal(2, 3, 5, 32)
    found = low_rank("bsef,efd->bsed", x, down_in, down_out)
    expected = jnp.einsum("bsef,efr,erd->bsed", x, down_in, down_out)
    assert relative_error(found, expected) < 1e-5
    config = tiny_config("mixtral")
    adapters = init_adapters(config, 2, ("query", "down"), 5, jax.random.key(0))
    assert adapters["query"]["in"].shape == (2, 32, 5)
    assert adapters["down"]["in"].shape == (2, config.n_experts, 40, 5)
    assert adapters["down"]["out"].shape == (2, config.n_experts, 5, 32)


# --- loading ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_folder(folder)
    return folder


@pytest.mark.parametrize("chunk_bytes", [1 << 26, 1], ids=["whole", "layer by layer"])
def test_loaded_onto_a_mesh(folder, chunk_bytes):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    config = dataclasses.replace(read_config(folder), quantise="int8")
    loaded = load_params(folder, config, mesh, chunk_bytes=chunk_bytes)
    expected = quantised_tree(load_params(folder, read_config(folder)), config)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    table = family_of(config).param_table(config)
    shardings = param_shardings(table, config, mesh)
    jax.tree.map(
        lambda x, s: s.is_equivalent_to(x.sharding, x.ndim) or pytest.fail(s), loaded, shardings
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(abstract_params(table, config))
    first = mesh.devices.flat[0]
    held = sum(
        shard.data.nbytes
        for x in jax.tree.leaves(loaded)
        for shard in x.addressable_shards
        if shard.device == first
    )
    assert sum(bytes_per_device(table, config, mesh).values()) == held
    header, rows = loading_report(config, mesh)
    assert rows[-1][header.index("bytes per device")] == f"{held:,}"
    assert all(isinstance(x, jax.Array) for name, x in loaded["layers"].items() if "norm" in name)


def test_bytes_of_the_matrices_of_a_real_shape():
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=1024)
    table, mesh = family_of(config).param_table(config), make_mesh(MeshConfig())
    half, int8 = (
        bytes_per_device(
            table, dataclasses.replace(config, dtype="bfloat16", quantise=quantise), mesh
        )
        for quantise in ("", "int8")
    )
    matrices = [row.path for row in table if row.scale_dims]
    assert len(matrices) == 9
    assert sum(int8[path] for path in matrices) <= 0.55 * sum(half[path] for path in matrices)
    assert all(int8[row.path] == half[row.path] for row in table if not row.scale_dims)


def test_clones_that_train_in_full_need_floats():
    changes = {"model": {"quantise": "int8"}, "lens": {"train_decoder": "full"}}
    with pytest.raises(ConfigError, match=r"lens\.train_decoder='full'.*model\.quantise='int8'"):
        experiment(changes | {"lens": {"train_decoder": "full", "train_encoder": "lora"}})
    with pytest.raises(ConfigError, match=r"model\.quantise must be 'int8' or empty, not 'int4'"):
        experiment({"model": {"quantise": "int4"}})
    changes["lens"] = {"train_decoder": "lora", "train_encoder": "frozen"}
    assert experiment(changes).model.quantise == "int8"


def experiment(changes):
    config = to_config_dict(ExperimentConfig())
    for section, values in changes.items():
        config[section].update(values)
    return from_config_dict(config)


def test_int8_weights_are_not_saved(folder, tmp_path):
    config = dataclasses.replace(read_config(folder), quantise="int8")
    with pytest.raises(ValueError, match=r"embedding, .*layers\.query.*without model\.quantise"):
        save_model(tmp_path / "again", config, load_params(folder, config))


# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_error_of_logits_and_kl(tied):
    config = dataclasses.replace(tiny_config(tie_word_embeddings=tied), unroll=1)
    params = random_params(config)
    int8 = quantised_tree(params, config)
    tokens = random_tokens(4, 16)
    run = jax.jit(functools.partial(forward, config=config))
    exact, rounded, floats = run(params, tokens), run(int8, tokens), run(as_floats(int8), tokens)
    assert relative_error(rounded, floats) < 1e-5
    assert 1e-3 < relative_error(rounded, exact) < 0.03
    p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(rounded)
    assert 0 < np.mean(np.sum(np.exp(p) * (p - q), axis=-1)) < 1e-3


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "gpt_oss"])
def test_every_kind_of_matrix_of_a_family(family):
    """Fused and stacked in the file, experts, a scaled table: here they are matrices alike."""
    config = dataclasses.replace(tiny_config(family), unroll=1)
    int8 = quantised_tree(random_params(config), config)
    rounded = {path[0].key for path, _ in matrices_of(int8["layers"])}
    assert {"query", "key", "value", "attention_out", "up", "down"} <= rounded
    assert not {"router", "sinks", "position_embedding"} & rounded
    tokens = random_tokens(2, 8)
    run = jax.jit(functools.partial(forward, config=config))
    assert relative_error(run(int8, tokens), run(as_floats(int8), tokens)) < 1e-5


def matrices_of(tree):
    is_int8 = lambda node: isinstance(node, Int8Matrix)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_int8)
    return [(path, node) for path, node in leaves if is_int8(node)]


@pytest.mark.parametrize("remat", ["none", "products"])
def test_backward_keeps_no_floats_of_the_matrices(remat):
    """Wide layers and few tokens: what is not small in the compiled program is weights. (Unrolled,
    a CPU program has a buffer of its own for every layer's floats, whatever is kept.)"""
    config = tiny_config(hidden_size=256, intermediate_size=512, num_hidden_layers=8, head_dim=64)
    config = dataclasses.replace(config, unroll=1, remat=remat, quantise="int8")
    table = family_of(config).param_table(config)
    layers = abstract_params(table, config)["layers"]

    def loss(x_BSD, layers):
        return jnp.sum(jnp.square(run_layers(layers, x_BSD, all_positions(1, 2), config=config)[0]))

    x_BSD = jax.ShapeDtypeStruct((1, 2, 256), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(x_BSD, layers).compile().memory_analysis()
    matrices = sum(4 * x.size for x in jax.tree.leaves(layers) if x.dtype == jnp.int8)
    assert memory.temp_size_in_bytes < 0.4 * matrices


# --- the lens -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="spec")
def reading(trainable, frozen, activation_BD, noise_BTV, *, spec):
    """Sampled text, and the gradient of a loss through its history, its logits and its reading."""
    tokens_BT = generate(decoder_of(trainable, frozen), activation_BD, noise_BTV, spec=spec)

    def loss(trainable):
        decoder = decoder_of(trainable, frozen)
        state_BTD = text_states(
            decoder, activation_BD, tokens_BT, noise_BTV, jnp.float32(1.0), spec
        )
        log_p = jax.nn.log_softmax(decoder_head(decoder, spec).logits(state_BTD))
        read_BD = encode_tokens(encoder_of(trainable, frozen, spec), tokens_BT, spec=spec)
        return jnp.mean(jnp.square(log_p)) + jnp.mean(jnp.square(read_BD))

    return tokens_BT, *jax.value_and_grad(loss)(trainable)


@pytest.mark.parametrize(
    "spec",
    [
        lora_spec(),
        lora_spec(
            "query,down", tied=True, history_gradient="sweeps", history_sweeps=2, remat="full"
        ),
        tiny_spec(
            train_decoder="frozen",
            train_encoder="frozen",
            train_output_head=True,
            history_gradient="detached",
        ),
    ],
    ids=["lora", "tied, sweeps", "frozen, own head, detached"],
)
def test_a_lens_on_an_int8_model_is_that_on_the_same_numbers_as_floats(spec):
    trainable, frozen = tiny_lens(spec)
    int8 = quantised_tree(frozen["original"], spec.model)
    inputs = tiny_batch(spec, frozen["original"]).activation_BD, tiny_noise()
    ours, expected = (
        reading(trainable, frozen | {"original": original}, *inputs, spec=spec)
        for original in (int8, as_floats(int8))
    )
    np.testing.assert_array_equal(ours[0], expected[0])
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-5)
    assert jax.tree.leaves(ours[2])
    errors = jax.tree.map(relative_error, ours[2], expected[2])
    assert max(jax.tree.leaves(errors)) < 1e-4, errors
