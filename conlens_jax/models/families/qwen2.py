"""Qwen2 and Qwen2.5: Llama with biases on query, key and value; the upper layers may have a window.

Source: transformers' ``modeling_qwen2.py`` and ``configuration_qwen2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.hf_config import HFConfigReader, layer_types_to_hf
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "qwen2"
_NEUTRAL = {"use_mrope": False}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Qwen2Config")
    sizes = common.read_sizes(
        read,
        vocab_size=151_936,
        d_model=4096,
        d_mlp=22_016,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        max_positions=32_768,
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        activation=read.activation("hidden_act", "silu"),
        attention_bias=True,
        rope=read_rope(read, sizes["max_positions"]),
        windows=upper_windows(read, sizes["n_layers"]),
    )
    read.finish(ignored=common.IGNORED_KEYS, neutral=_NEUTRAL)
    return config


def upper_windows(read: HFConfigReader, n_layers: int) -> tuple[int, ...]:
    """Of the layers from ``max_window_layers`` on, where ``use_sliding_window`` is set."""
    first, used = read("max_window_layers", 28), read("use_sliding_window", False)
    window = read("sliding_window", 4096) if used else None
    read.read_keys.add("sliding_window")
    return read.windows(n_layers, window, lambda layer: bool(window) and layer >= first)


def upper_windows_to_hf(config: TransformerConfig) -> dict[str, Any]:
    types = layer_types_to_hf(config.windows, config.n_layers)
    return types | {"use_sliding_window": bool(config.windows)}


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    sizes = common.sizes_to_hf(config, MODEL_TYPE, "Qwen2ForCausalLM")
    return sizes | upper_windows_to_hf(config)


def param_table(config: TransformerConfig) -> list[ParamRow]:
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(),
        *common.attention_rows(qkv_bias=True),
        *common.gated_mlp_rows(),
    ]
