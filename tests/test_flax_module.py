"""The Flax module: the pure functions' parameters and numbers, and Flax's own tools on it."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import hf_forward, hf_model, random_params, random_tokens, tiny_config

from conlens_jax.models import hf_io
from conlens_jax.models.families import family_of
from conlens_jax.models.flax_module import Block, Transformer
from conlens_jax.models.param_table import abstract_params
from conlens_jax.models.transformer import forward

FAMILIES = ("llama", "gpt2", "gemma3_text", "gpt_oss", "gpt_neo")


@pytest.mark.parametrize("family", FAMILIES)
def test_init_makes_the_parameters_of_the_table(family):
    config = tiny_config(family)
    made = jax.eval_shape(Transformer(config).init, jax.random.key(0), random_tokens(2, 5))
    assert made == {"params": abstract_params(family_of(config).param_table(config), config)}


def test_a_family_that_it_does_not_have():
    module = Transformer(tiny_config("gemma4_text"))
    with pytest.raises(ValueError, match="gemma4_text: there is no Flax module of layers that"):
        jax.eval_shape(module.init, jax.random.key(0), random_tokens(2, 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_is_forward(family):
    config = dataclasses.replace(tiny_config(family), unroll=1, remat="full")
    params, tokens = random_params(config), random_tokens(2, 9)
    mask = np.arange(9)[None] >= np.array([[0], [3]])
    logits = jax.jit(Transformer(config).apply)({"params": params}, tokens, mask)
    expected = jax.jit(forward, static_argnames="config")(
        params, tokens, config=config, mask_BS=mask
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)


def test_layers_are_captured_as_transformers_has_them(tmp_path):
    theirs, tokens = hf_model("llama"), random_tokens(2, 9)
    theirs.save_pretrained(tmp_path)
    config = hf_io.read_config(tmp_path)
    variables = {"params": hf_io.load_params(tmp_path, config)}
    logits, seen = Transformer(config).apply(variables, tokens, capture_intermediates=True)
    ((layers_NBSD, _),) = seen["intermediates"]["layers"]["__call__"]
    expected, blocks_BNSD = hf_forward(theirs, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(layers_NBSD.swapaxes(0, 1), blocks_BNSD, rtol=0, atol=1e-5)


def test_a_hook_replaces_the_output_of_a_layer():
    config = tiny_config()
    params, tokens = random_params(config), random_tokens(2, 9)

    def zero_blocks(call, arguments, keywords, context):
        out = call(*arguments, **keywords)
        is_layer = isinstance(context.module, Block) and context.method_name == "__call__"
        return (jnp.zeros_like(out[0]), None) if is_layer else out

    with nn.intercept_methods(zero_blocks):
        logits = Transformer(config).apply({"params": params}, tokens)
    np.testing.assert_array_equal(logits, 0)


def test_tabulate_prints_the_parameters():
    config = tiny_config()
    table = Transformer(config).tabulate(jax.random.key(0), random_tokens(2, 5))
    for row in family_of(config).param_table(config):
        assert row.path[-1] in table
