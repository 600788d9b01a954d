"""The shapes of real models in ``third_party/model_configs``: counted, and built on meshes."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from conlens_jax.config import ConfigError, ExperimentConfig
from conlens_jax.models.families import family_of
from conlens_jax.models.param_table import abstract_params, count_params
from conlens_jax.models.transformer import forward
from conlens_jax.parallel.footprint import count, device_bytes, total_bytes
from conlens_jax.parallel.mesh import MESH_PRESETS, make_mesh, single_device_mesh
from conlens_jax.planning.lens import make_plan, on_mesh
from conlens_jax.planning.model_source import SHIPPED, planned_model

FILES = {file.stem: file for file in sorted(SHIPPED.glob("*.json"))}
# The tensor axis divides neither every vocabulary nor one or two key-value heads.
TOO_FINE = {
    (name, "fsdp2_tensor4"): dimension
    for name, dimension in (
        ("gpt2", "V=50257"),
        ("TinyStories-33M", "V=50257"),
        ("SimpleStories-5M", "K=2"),
        ("gemma-2b-it", "K=1"),
        ("granite-3.3-8b-instruct", "V=49159"),
        ("Olmo-3-1025-7B", "V=100278"),
        ("falcon-7b", "H=71"),
        ("GLM-4-9B-0414", "K=2"),
    )
}


def published() -> dict[str, int]:
    """Parameters by file, from the table in the README."""
    rows = re.findall(r"^\| `(.+)\.json` \| \S+ \| ([\d,]+) \|", readme(), re.MULTILINE)
    return {name: int(number.replace(",", "")) for name, number in rows}


def readme() -> str:
    return (SHIPPED / "README.md").read_text(encoding="utf-8")


def shape_of(name: str):
    config = dataclasses.replace(
        ExperimentConfig(),
        model=dataclasses.replace(
            ExperimentConfig().model, path=str(FILES[name]), dtype="bfloat16", unroll=1
        ),
    )
    return config, planned_model(config)


def test_the_readme_has_every_file():
    assert set(published()) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_parameters_are_as_many_as_published(name):
    shape = shape_of(name)[1].shape
    assert count_params(family_of(shape).param_table(shape), shape) == published()[name]


@pytest.mark.parametrize("name", FILES)
def test_the_network_runs_on_shapes(name):
    """Every parameter fits the place where it is used, in the network as in the table."""
    shape = shape_of(name)[1].shape
    params = abstract_params(family_of(shape).param_table(shape), shape)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    run = lambda params, tokens: forward(params, tokens, config=shape)
    logits = jax.eval_shape(run, params, tokens)
    assert logits.shape == (2, 16, shape.vocab_size) and logits.dtype == jnp.float32


@pytest.mark.parametrize("preset", MESH_PRESETS)
@pytest.mark.parametrize("name", FILES)
def test_a_lens_of_it_is_laid_out_on_a_mesh(name, preset):
    config, model = shape_of(name)
    mesh = single_device_mesh() if preset == "single" else make_mesh(MESH_PRESETS[preset])
    if (name, preset) in TOO_FINE:
        with pytest.raises(ConfigError, match=f"mesh.tensor=4 .*{TOO_FINE[name, preset]} "):
            make_plan(config, model, mesh)
        return
    plan = make_plan(config, model, mesh)
    original = plan.frozen["original"]
    assert count(original) == published()[name] and total_bytes(original) == 2 * count(original)
    whole, here = total_bytes(original), device_bytes(original)
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    # Norms, biases and routers may lie whole on every device.
    assert whole / parts <= here < whole / parts * 1.1
    assert here == whole or parts > 1
    layers = on_mesh({"layers": original["layers"]}, model.shape, mesh)["layers"]
    assert jax.tree.map(lambda leaf: leaf.sharding, layers) == jax.tree.map(
        lambda leaf: leaf.sharding, original["layers"]
    )
