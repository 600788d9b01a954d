"""OLMoE: experts, norms of queries and keys over all heads, optionally clipped queries, keys and
values.

Source: transformers' ``modeling_olmoe.py`` and ``configuration_olmoe.py``; arXiv:2409.02060.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common, qwen3_moe
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "olmoe"
_IGNORED_KEYS = common.IGNORED_KEYS | {"output_router_logits", "router_aux_loss_coef"}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "OlmoeConfig")
    sizes = common.read_sizes(
        read,
        vocab_size=50_304,
        d_model=2048,
        d_mlp=2048,
        n_layers=16,
        n_heads=16,
        n_kv_heads=None,
        max_positions=4096,
        norm_eps=1e-5,
        eos=50_279,
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        qk_norm="width",
        qkv_clip=read("clip_qkv", None) or 0.0,
        activation=read.activation("hidden_act", "silu"),
        attention_bias=read("attention_bias", False),
        n_experts=read("num_experts", 64),
        experts_per_token=read("num_experts_per_tok", 8),
        router_normalized=read("norm_topk_prob", False),
        rope=read_rope(read, sizes["max_positions"]),
    )
    read.finish(ignored=_IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return common.sizes_to_hf(config, MODEL_TYPE, "OlmoeForCausalLM") | {
        "attention_bias": config.attention_bias,
        "clip_qkv": config.qkv_clip or None,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.router_normalized,
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    bias = config.attention_bias
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(),
        *common.attention_rows(qkv_bias=bias, out_bias=bias),
        *common.qk_norm_rows("HX", "KX"),
        *qwen3_moe.expert_rows(),
    ]
