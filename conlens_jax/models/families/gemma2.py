"""Gemma 2: scaled embeddings, norms of weight 1 + w before and after attention and MLP, soft caps,
a window in every second layer.

Source: transformers' ``modeling_gemma2.py`` and ``configuration_gemma2.py``; arXiv:2408.00118.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.hf_config import HFConfigReader, activation_to_hf, layer_types_to_hf
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "gemma2"
_NEUTRAL = {"use_bidirectional_attention": (None, False)}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Gemma2Config")
    sizes = common.read_sizes(
        read,
        vocab_size=256_000,
        d_model=2304,
        d_mlp=9216,
        n_layers=26,
        n_heads=8,
        n_kv_heads=4,
        head_dim=256,
        max_positions=8192,
        tied=True,
        bos=2,
        eos=1,
    )
    window = read("sliding_window", 4096)
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        **norms_and_scales(read, sizes["d_model"], final_cap=30.0),
        attention_soft_cap=read("attn_logit_softcapping", 50.0) or 0.0,
        rope=read_rope(read, sizes["max_positions"]),
        windows=read.windows(sizes["n_layers"], window, lambda layer: layer % 2 == 0),
    )
    # transformers reads only hidden_activation; old files have a different hidden_act too.
    ignored = common.IGNORED_KEYS | {"hidden_act", "sliding_window_size"}
    read.finish(ignored=ignored, neutral=_NEUTRAL)
    return config


def norms_and_scales(
    read: HFConfigReader, d_model: int, *, final_cap: float | None
) -> dict[str, Any]:
    """The fields that all Gemmas share; the cap is the family's default."""
    return {
        "norm_offset": 1.0,
        "norm_in_fp32": True,
        "post_norms": True,
        "activation": read.activation("hidden_activation", "gelu_pytorch_tanh"),
        "embedding_scale": math.sqrt(d_model),
        "attention_bias": read("attention_bias", False),
        "attention_scale": read("query_pre_attn_scalar", 256) ** -0.5,
        "final_soft_cap": read("final_logit_softcapping", final_cap) or 0.0,
    }


def norms_and_scales_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_activation": activation_to_hf(config.activation),
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "attn_logit_softcapping": config.attention_soft_cap or None,
        "final_logit_softcapping": config.final_soft_cap or None,
        **layer_types_to_hf(config.windows, config.n_layers),
    }


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    sizes = common.sizes_to_hf(config, MODEL_TYPE, "Gemma2ForCausalLM")
    return sizes | norms_and_scales_to_hf(config)


def param_table(config: TransformerConfig) -> list[ParamRow]:
    bias = config.attention_bias
    return [
        *common.end_rows(config),
        *norm_rows(),
        *common.attention_rows(qkv_bias=bias, out_bias=bias),
        *common.gated_mlp_rows(),
    ]


def norm_rows(init: str = "zeros") -> list[ParamRow]:
    names = {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    return [common.norm_row(ours, theirs, init=init) for ours, theirs in names.items()]
