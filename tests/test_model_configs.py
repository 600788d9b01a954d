"""The configs of real models in ``third_party/model_configs``: read, counted, built on meshes."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from conlens_jax.config import ConfigError, ExperimentConfig
from conlens_jax.models import hf_config
from conlens_jax.models.families import FAMILIES, config_from_hf, family_of
from conlens_jax.models.families.text_parts import text_part
from conlens_jax.models.param_table import abstract_params, count_params, count_zeros
from conlens_jax.models.transformer import forward
from conlens_jax.parallel.footprint import count, device_bytes, total_bytes
from conlens_jax.parallel.mesh import MESH_PRESETS, make_mesh, single_device_mesh
from conlens_jax.planning.lens import make_plan, on_mesh
from conlens_jax.planning.model_source import SHIPPED, planned_model
from conlens_jax.planning.report import model_table

FILES = {file.stem: file for file in sorted(SHIPPED.glob("*.json"))}


def published(section: str) -> dict[str, int]:
    """Parameters by file, from a table of the README."""
    text = (SHIPPED / "README.md").read_text(encoding="utf-8").partition(f"## {section}\n")[2]
    table = text.partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+)\.json` \| [^|]+ \| ([\d,]+) \|", table, re.MULTILINE)
    return {name: int(number.replace(",", "")) for name, number in rows}


SHAPES = published("Shapes")
PARAMETERS = SHAPES | published("Files with all their keys")


def values_of(name: str) -> dict:
    return json.loads(FILES[name].read_text(encoding="utf-8"))


# A file of a type that is not supported must say so, and is read as soon as it is.
KNOWN = [name for name in FILES if text_part(values_of(name)).get("model_type") in FAMILIES]
UNKNOWN = [name for name in FILES if name not in KNOWN]
# The keys of each file that change nothing in transformers either; of other files, none.
_SMOLLM2 = "is_llama_config rope_interleaved transformers.js_config"
_MLC = "context_window_size prefill_chunk_size"
IGNORED = {
    "ALLaM-7B-Instruct-preview": "internal_version",
    "CodeLlama-34b-hf": _MLC,
    "CodeLlama-7b-hf": _MLC,
    "Qwen3-Coder-480B-A35B-Instruct": "qkv_bias shared_expert_intermediate_size use_qk_norm",
    "SmolLM2-135M-Instruct": _SMOLLM2,
    "SmolLM2-360M-Instruct": _SMOLLM2,
    "gpt-j-6B-8bit": "eight_bit",
    "gpt2-medium": "n_special",
    "phi-1": "attention_bias rotary_dim",
    "starcoder2-7b": "activation_function attention_softmax_in_fp32 layer_norm_epsilon "
    "scale_attention_softmax_in_fp32 scale_attn_weights",
}
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
        ("gemma-4-E2B-it", "K=1"),
    )
}


def shape_of(name: str):
    config = dataclasses.replace(
        ExperimentConfig(),
        model=dataclasses.replace(
            ExperimentConfig().model, path=str(FILES[name]), dtype="bfloat16", unroll=1
        ),
    )
    return config, planned_model(config)


def test_the_readme_has_every_file():
    assert set(PARAMETERS) == set(FILES) and len(FILES) >= 60


@pytest.mark.parametrize("name", KNOWN)
def test_keys_that_change_nothing_are_ignored_by_name(name, caplog, monkeypatch):
    hf_config._warn_once.cache_clear()
    # Which would import transformers, and take seconds.
    monkeypatch.setattr(hf_config, "default_of", lambda *_: pytest.fail("a class was asked"))
    config_from_hf(values_of(name))
    ignored = [record.args[1].replace(",", "") for record in caplog.records]
    assert ignored == ([IGNORED[name]] if name in IGNORED else [])


def test_types_that_are_not_supported_are_named():
    for name in UNKNOWN:
        with pytest.raises(ValueError, match=f"{values_of(name)['model_type']!r} is not supported"):
            config_from_hf(values_of(name))


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_as_many_as_published(name):
    shape = shape_of(name)[1].shape
    assert count_params(family_of(shape).param_table(shape), shape) == PARAMETERS[name]


@pytest.mark.parametrize("name", KNOWN)
def test_the_network_runs_on_shapes(name):
    """Every parameter fits the place where it is used, in the network as in the table."""
    shape = shape_of(name)[1].shape
    params = abstract_params(family_of(shape).param_table(shape), shape)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    run = lambda params, tokens: forward(params, tokens, config=shape)
    logits = jax.eval_shape(run, params, tokens)
    assert logits.shape == (2, 16, shape.vocab_size) and logits.dtype == jnp.float32


@pytest.mark.parametrize("preset", MESH_PRESETS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_lens_of_it_is_laid_out_on_a_mesh(name, preset):
    config, model = shape_of(name)
    mesh = single_device_mesh() if preset == "single" else make_mesh(MESH_PRESETS[preset])
    if (name, preset) in TOO_FINE:
        with pytest.raises(ConfigError, match=f"mesh.tensor=4 .*{TOO_FINE[name, preset]} "):
            make_plan(config, model, mesh)
        return
    plan = make_plan(config, model, mesh)
    original = plan.frozen["original"]
    # Where layers differ in shape, what is beside the smaller ones is stored too.
    table = family_of(model.shape).param_table(model.shape)
    zeros = count_zeros(table, model.shape)
    assert count(original) == SHAPES[name] + zeros
    assert (model_table(plan)[1][-1][1] == f"{zeros:,}") == bool(zeros)
    assert total_bytes(original) == 2 * count(original)
    whole, here = total_bytes(original), device_bytes(original)
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    # Norms, biases and routers may lie whole on every device.
    assert whole / parts <= here < whole / parts * 1.1
    assert here == whole or parts > 1
    layers = on_mesh({"layers": original["layers"]}, model.shape, mesh)["layers"]
    assert jax.tree.map(lambda leaf: leaf.sharding, layers) == jax.tree.map(
        lambda leaf: leaf.sharding, original["layers"]
    )
