"""Gemma 1: Llama with scaled embeddings, norms of weight 1 + w, wide heads and gelu.

Source: transformers' ``modeling_gemma.py`` and ``configuration_gemma.py``; arXiv:2403.08295.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "gemma"
# transformers reads hidden_act only, in which old files' "gelu" means the tanh form.
_IGNORED_KEYS = common.IGNORED_KEYS | {"hidden_activation"}
_NEUTRAL = {"use_bidirectional_attention": (None, False)}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "GemmaConfig")
    sizes = common.read_sizes(
        read,
        vocab_size=256_000,
        d_model=3072,
        d_mlp=24_576,
        n_layers=28,
        n_heads=16,
        n_kv_heads=16,
        head_dim=256,
        max_positions=8192,
        tied=True,
        bos=2,
        eos=1,
    )
    activation = read.activation("hidden_act", "gelu_pytorch_tanh")
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        norm_offset=1.0,
        norm_in_fp32=True,
        activation="gelu_tanh" if activation == "gelu" else activation,
        embedding_scale=math.sqrt(sizes["d_model"]),
        attention_bias=read("attention_bias", False),
        rope=read_rope(read, sizes["max_positions"]),
    )
    read.finish(ignored=_IGNORED_KEYS, neutral=_NEUTRAL)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return common.sizes_to_hf(config, MODEL_TYPE, "GemmaForCausalLM") | {
        "attention_bias": config.attention_bias
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    bias = config.attention_bias
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(init="zeros"),
        *common.attention_rows(qkv_bias=bias, out_bias=bias),
        *common.gated_mlp_rows(),
    ]
