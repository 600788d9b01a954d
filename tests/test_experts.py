"""The forms of a mixture of experts against the product of every expert with every token."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import relative_error
from tiny_models import random_params, tiny_config

import benchmark_experts
from conlens_jax.models.adapters import init_adapters, with_adapters
from conlens_jax.models.backward import TokenVjp, forward_with_residuals, layers_vjp
from conlens_jax.models.experts import _LEAST_ROWS, Choice, _blocks_of, expert_product
from conlens_jax.models.families import family_of
from conlens_jax.models.mlp import mix_experts
from conlens_jax.models.products import Products
from conlens_jax.models.quantized import quantise
from conlens_jax.models.sharding import param_shardings
from conlens_jax.models.transformer import all_positions, run_layers
from conlens_jax.parallel.mesh import MESH_PRESETS, batch_sharding, make_mesh, replicated

E, K = 4, 2
# The experts that the router prefers: all pairs on two of them, or spread; and few tokens.
CHOICES = {
    "spread": np.random.default_rng(0).permuted(np.tile(np.arange(E), (24, 1)), axis=1)[:, :K],
    "two experts": np.tile([3, 1], (40, 1)),
    "one token": np.array([[2, 0]]),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("form", ["blocks", "ragged"])
def test_every_pair_is_multiplied_by_its_expert(form, name):
    experts = CHOICES[name]
    choice = Choice(jnp.asarray(experts[None], jnp.int32), form)
    x, up, down = normal(1, 1, len(experts), 5), normal(2, E, 5, 7), normal(3, E, 7, 3)

    def ours(x, up, down):
        hidden = expert_product("bsd,edf->bskf", x, up, choice)
        return expert_product("bskf,efd->bskd", hidden, down, choice)

    def oracle(x, up, down):
        return jnp.einsum("bsd,bskdf,bskfo->bsko", x, up[experts[None]], down[experts[None]])

    found, pull = jax.vjp(jax.jit(ours), x, up, down)
    expected, expected_pull = jax.vjp(oracle, x, up, down)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    bar = normal(4, *found.shape)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4),
        pull(bar),
        expected_pull(bar),
    )


@pytest.mark.parametrize("name", CHOICES)
def test_blocks_hold_every_pair_once(name):
    experts = CHOICES[name].reshape(-1)
    blocks = _blocks_of(jnp.asarray(experts), E)
    count, pairs = int(blocks.count), np.asarray(blocks.pairs_nb)
    assert (pairs[count:] == len(experts)).all()
    held = pairs[pairs < len(experts)]
    np.testing.assert_array_equal(np.sort(held), np.arange(len(experts)))
    np.testing.assert_array_equal(pairs.reshape(-1)[blocks.rows_M], np.arange(len(experts)))
    for row, expert in zip(pairs[:count], blocks.experts_n[:count], strict=True):
        assert (experts[row[row < len(experts)]] == expert).all() and row[0] < len(experts)
    # No more blocks than needed: experts without a token are not read.
    sizes = np.bincount(experts, minlength=E)
    assert count == sum(-(-sizes // pairs.shape[1])) and pairs.shape[1] >= _LEAST_ROWS


def layers_of(family: str, *, int8: bool = False, adapters: bool = False, **changes):
    """(config, stacked parameters of two layers, an input); ``changes`` are keys of config.json."""
    config = dataclasses.replace(tiny_config(family, num_hidden_layers=2, **changes), unroll=1)
    layers = random_params(config)["layers"]
    if int8:
        for row in family_of(config).param_table(config):
            if row.has_experts and row.scale_dims:
                inputs = tuple(i for i, dim in enumerate(row.scale_dims) if dim == "1")
                layers[row.path[-1]] = quantise(layers[row.path[-1]], inputs)
    if adapters:
        made = init_adapters(config, 2, ("gate", "down"), 3, jax.random.key(0))
        made = jax.tree.map(lambda leaf: leaf + 0.1, made)
        layers = with_adapters(layers, made, jnp.float32(0.5))
    return config, layers, normal(5, 8, 6, config.d_model)


VARIANTS = {
    "biases and a clamp": ("gpt_oss", {}),
    "adapters": ("qwen3_moe", {"adapters": True}),
    "int8": ("mixtral", {"int8": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_and_their_gradients_equal_the_dense_form(name):
    """By plain autodiff, and by the hand-written backward pass: whole, and token by token."""
    family, changes = VARIANTS[name]
    config, layers, x_BSD = layers_of(family, **changes)
    floats = {key: leaf for key, leaf in layers.items() if isinstance(leaf, jax.Array)}
    bar = normal(6, *x_BSD.shape)
    positions = all_positions(*x_BSD.shape[:2])

    @functools.partial(jax.jit, static_argnames="config")
    def plain(floats, x_BSD, config):
        run = lambda floats, x: run_layers({**layers, **floats}, x, positions, config=config)[0]
        out, pull = jax.vjp(run, floats, x_BSD)
        return out, *pull(bar)

    @functools.partial(jax.jit, static_argnames="config")
    def by_hand(floats, x_BSD, config):
        whole = {**layers, **floats}
        out, residuals = forward_with_residuals(whole, x_BSD, positions, config=config)
        layers_bar, x_bar, _ = layers_vjp(whole, residuals, bar, positions, config=config)
        visit = TokenVjp(whole, residuals, positions, 0, config)

        def back(later, token):
            token_bar, later = visit(token, bar[:, token], later)
            return later, token_bar

        tokens = jnp.arange(x_BSD.shape[1])
        _, token_bars = jax.lax.scan(back, visit.start(), tokens, reverse=True)
        assert residuals.products["up"].shape[3] == config.experts_per_token
        layers_bar = {key: layers_bar[key] for key in floats}
        return out, layers_bar, x_bar, token_bars.swapaxes(0, 1)

    out, floats_bar, x_bar = plain(floats, x_BSD, dataclasses.replace(config, experts="dense"))
    blocks = dataclasses.replace(config, experts="blocks")
    assert relative_error(plain(floats, x_BSD, blocks), (out, floats_bar, x_bar)) < 1e-5
    found = by_hand(floats, x_BSD, blocks)
    assert relative_error(found, (out, floats_bar, x_bar, x_bar)) < 1e-5


def mixed_and_gradients(layers, x_BSD, config):
    """The mixture of the first layer's experts, and a gradient through it."""

    def value(layers, x_BSD):
        layer = {name: leaf[0] for name, leaf in layers.items()}
        mixed = mix_experts(x_BSD, Products(layer), config)
        return jnp.mean(jnp.sin(3 * mixed)), mixed

    run = jax.jit(jax.grad(value, (0, 1), has_aux=True))
    (layers_bar, x_bar), mixed = run(layers, x_BSD)
    return mixed, x_bar, {name: leaf for name, leaf in layers_bar.items() if leaf.any()}


@pytest.fixture(scope="module")
def alone():
    config, layers, x_BSD = layers_of("gpt_oss", adapters=True, num_key_value_heads=4)
    expected = mixed_and_gradients(layers, x_BSD, dataclasses.replace(config, experts="dense"))
    return config, layers, x_BSD, expected


@pytest.mark.parametrize("preset", [name for name in MESH_PRESETS if name != "single"])
def test_the_same_numbers_on_every_mesh(preset, alone):
    """Each device sorts its own tokens; matrices are split along D and F."""
    config, layers, x_BSD, expected = alone
    slices = 2 if preset == "multislice" else 0
    mesh = make_mesh(dataclasses.replace(MESH_PRESETS[preset], slices=slices))
    table = [row for row in family_of(config).param_table(config) if row.stacked]
    shardings = param_shardings(table, config, mesh)["layers"]
    place = lambda name, leaf: jax.device_put(leaf, shardings.get(name, replicated(mesh)))
    layers = {name: place(name, leaf) for name, leaf in layers.items()}
    with jax.set_mesh(mesh):
        x_BSD = jax.device_put(x_BSD, batch_sharding(mesh))
        found = mixed_and_gradients(layers, x_BSD, dataclasses.replace(config, experts="blocks"))
    assert relative_error(found, expected) < 1e-5


def test_remat_keeps_the_products_of_experts():
    """They are loops, which no policy of JAX's own knows."""
    config, layers, x_BSD = layers_of("gpt_oss")
    positions = all_positions(*x_BSD.shape[:2])

    def loops(remat: str) -> int:
        changed = dataclasses.replace(config, remat=remat)
        loss = lambda x_BSD: jnp.sum(run_layers(layers, x_BSD, positions, config=changed)[0])
        return str(jax.make_jaxpr(jax.grad(loss))(x_BSD)).count("while[")

    assert loops("products") == loops("none") == loops("full") - 3


def test_a_frozen_matrix_has_no_gradient_in_the_program():
    """A cotangent that nobody asks for is not computed, and no expert is multiplied by all."""
    config, layers, x_BSD = layers_of("mixtral")
    positions = all_positions(*x_BSD.shape[:2])

    def program(wanted):
        def loss(layers, x_BSD):
            _, residuals = forward_with_residuals(layers, x_BSD, positions, config=config)
            return layers_vjp(layers, residuals, x_BSD, positions, config=config)[wanted]

        return jax.jit(loss).lower(layers, x_BSD).compile().as_text()

    d, f = config.d_model, config.d_mlp
    of_matrices = re.compile(rf"f32\[(?:{d},{f}|{f},{d})\]\S* dot\(")
    assert of_matrices.search(program(0)) and not of_matrices.search(program(1))
    dense = re.compile(rf"f32\[[\d,]*\b{E},{f}\]\S* dot\(")
    assert not dense.search(program(1))


def test_the_benchmark_times_every_form(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_experts, "matmul_rate", lambda dtype, repeat: 1e9)
    shape = "--experts=4 --chosen=2 --width=16 --mlp=8 --tokens 3 --repeat=1 --memory=1"
    forms = ["blocks", "ragged", "dense"]
    (row,) = benchmark_experts.main([*shape.split(), "--passes", "weights", "--forms", *forms])
    assert all(row[form] > 0 for form in forms)
    assert "| float32 | 3 | weights |" in capsys.readouterr().out
