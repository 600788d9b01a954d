"""Qwen3: Llama with a norm of each head's query and key; the upper layers may have a window.

Source: transformers' ``modeling_qwen3.py`` and ``configuration_qwen3.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.families.qwen2 import upper_windows, upper_windows_to_hf
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "qwen3"


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Qwen3Config")
    sizes = common.read_sizes(
        read,
        vocab_size=151_936,
        d_model=4096,
        d_mlp=22_016,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
        max_positions=32_768,
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        qk_norm="head",
        activation=read.activation("hidden_act", "silu"),
        attention_bias=read("attention_bias", False),
        rope=read_rope(read, sizes["max_positions"]),
        windows=upper_windows(read, sizes["n_layers"]),
    )
    read.finish(ignored=common.IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    sizes = common.sizes_to_hf(config, MODEL_TYPE, "Qwen3ForCausalLM")
    return sizes | upper_windows_to_hf(config) | {"attention_bias": config.attention_bias}


def param_table(config: TransformerConfig) -> list[ParamRow]:
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(),
        *common.attention_rows(qkv_bias=config.attention_bias, out_bias=config.attention_bias),
        *common.qk_norm_rows("X", "X"),
        *common.gated_mlp_rows(),
    ]
