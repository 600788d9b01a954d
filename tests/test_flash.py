"""The switch ``model.attention``: when the kernel is used, and that it is asked the right thing.

There is no GPU here. The same call runs through JAX's plain implementation of the same entry point.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import relative_error
from tiny_models import random_params, random_tokens, tiny_config

from conlens_jax.models import flash
from conlens_jax.models.transformer import forward

SPANS = ((0, 12), (4, 12), (0, 7), (2, 9))


@pytest.fixture
def inputs():
    place = np.arange(12)
    mask = np.array([(place >= first) & (place < stop) for first, stop in SPANS])
    return np.where(mask, random_tokens(len(SPANS), 12), 0), mask


def config_of(family: str, **changes):
    return dataclasses.replace(tiny_config(family), unroll=1, **changes)


@pytest.mark.parametrize(("family", "length"), [("llama", 11), ("gemma3_text", 12)])
def test_the_kernels_arguments_give_the_same_network(inputs, monkeypatch, family, length):
    """Padding on both sides, grouped heads, and (gemma3) windows, another scale and two kinds of
    layers; values and gradients. The kernel's gradient exists for even lengths only."""
    tokens, mask = (x[:, :length] for x in inputs)
    config = config_of(family)
    params = random_params(config)

    def loss(params, config):
        logits = forward(params, tokens, config=config, mask_BS=mask)[mask]
        return jnp.sum(jnp.sin(logits)), logits

    run = lambda config: jax.jit(jax.grad(functools.partial(loss, config=config), has_aux=True))
    expected = run(config)(params)
    monkeypatch.setattr(flash, "is_usable", lambda config: config.attention == "cudnn")
    calls = []

    kernel = jax.nn.dot_product_attention

    def called(query, key, value, *, implementation, **others):
        assert implementation == "cudnn" and query.shape[1] % 2 == 0
        calls.append(query.shape)
        return kernel(query, key, value, implementation="xla", **others)

    monkeypatch.setattr(jax.nn, "dot_product_attention", called)
    found = run(dataclasses.replace(config, attention="cudnn"))(params)
    assert calls
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"dtype": "float32"}, "16 bits"),
        ("llama", {"head_dim": 12}, "multiple of 8"),
        ("llama", {"head_dim": 264}, "at most 256"),
        ("gemma2", {"head_dim": 16}, "soft cap"),
        ("gpt_oss", {"head_dim": 16}, "sinks"),
        ("gpt2", {"scale_by_depth": True}, "one scale"),
    ],
)
def test_what_the_kernel_cannot_do(family, changes, reason):
    config = config_of(family, **{"dtype": "bfloat16", "attention": "cudnn"} | changes)
    (found,) = flash.obstacles(config, "gpu")
    assert reason in found


def test_what_the_kernel_can_do():
    for family in ("llama", "mistral", "qwen2", "phi3", "olmo2", "gpt2", "gpt_neox", "mixtral"):
        assert not flash.obstacles(config_of(family, dtype="bfloat16"), "gpu"), family
    config = config_of("gemma3_text", dtype="bfloat16", head_dim=256)
    assert not flash.obstacles(config, "gpu")


def test_falling_back_is_said_once(inputs, caplog):
    tokens, mask = inputs
    config = config_of("gemma2", attention="cudnn")
    params = random_params(config)
    flash._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        logits = [
            jax.jit(functools.partial(forward, config=c, mask_BS=mask))(params, tokens)
            for c in (config, config_of("gemma2"))
        ]
        jax.jit(functools.partial(forward, config=config))(params, tokens)
    np.testing.assert_array_equal(*logits)
    (line,) = [record.getMessage() for record in caplog.records]
    for part in ('"cudnn" falls back to "xla"', "not on cpu", "float32", "soft cap", "multiple of"):
        assert part in line
