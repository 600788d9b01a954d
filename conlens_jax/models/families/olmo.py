"""OLMo 1: Llama with layer norms that have no parameters, and clipped queries, keys and values.

Source: transformers' ``modeling_olmo.py`` and ``configuration_olmo.py``; arXiv:2402.00838.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "olmo"
_NAMES = {"rms_norm_eps": None}  # a constant of transformers' code


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "OlmoConfig", _NAMES)
    sizes = common.read_sizes(
        read,
        vocab_size=50_304,
        d_model=4096,
        d_mlp=11_008,
        n_layers=32,
        n_heads=32,
        n_kv_heads=None,
        max_positions=2048,
        norm_eps=1e-5,
        eos=50_279,
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        norm="layer",
        norm_weights=False,
        qkv_clip=read("clip_qkv", None) or 0.0,
        activation=read.activation("hidden_act", "silu"),
        attention_bias=read("attention_bias", False),
        rope=read_rope(read, sizes["max_positions"]),
    )
    read.finish(ignored=common.IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return common.sizes_to_hf(config, MODEL_TYPE, "OlmoForCausalLM", _NAMES) | {
        "attention_bias": config.attention_bias,
        "clip_qkv": config.qkv_clip or None,
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    bias = config.attention_bias
    return [
        *common.end_rows(config),
        *common.attention_rows(qkv_bias=bias, out_bias=bias),
        *common.gated_mlp_rows(),
    ]
