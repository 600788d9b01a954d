"""Mistral: Llama with a window in every layer.

Source: transformers' ``modeling_mistral.py`` and ``configuration_mistral.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "mistral"


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "MistralConfig")
    sizes = common.read_sizes(
        read,
        vocab_size=32_000,
        d_model=4096,
        d_mlp=14_336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        max_positions=131_072,
        bos=1,
        eos=2,
    )
    window = read("sliding_window", 4096)
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        activation=read.activation("hidden_act", "silu"),
        rope=read_rope(read, sizes["max_positions"]),
        windows=(window,) * sizes["n_layers"] if window else (),
    )
    read.finish(ignored=common.IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return common.sizes_to_hf(config, MODEL_TYPE, "MistralForCausalLM") | {
        "sliding_window": max(config.windows, default=None)
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(),
        *common.attention_rows(),
        *common.gated_mlp_rows(),
    ]
