"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer.

Source: transformers' ``modeling_qwen3_moe.py`` and ``configuration_qwen3_moe.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.families.common import LAYER, layer_row
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "qwen3_moe"
_IGNORED_KEYS = common.IGNORED_KEYS | {
    *("output_router_logits", "router_aux_loss_coef", "max_window_layers"),
    # Of layers with one MLP, which are not supported: see _NEUTRAL.
    "intermediate_size",
}
_NEUTRAL = {"decoder_sparse_step": 1, "mlp_only_layers": (None, [])}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Qwen3MoeConfig")
    sizes = common.read_sizes(
        read,
        vocab_size=151_936,
        d_model=2048,
        d_mlp=6144,
        n_layers=24,
        n_heads=32,
        n_kv_heads=4,
        max_positions=32_768,
    )
    window = read("sliding_window", 4096) if read("use_sliding_window", False) else None
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes | {"d_mlp": read("moe_intermediate_size", 768)},
        qk_norm="head",
        activation=read.activation("hidden_act", "silu"),
        attention_bias=read("attention_bias", False),
        n_experts=read("num_local_experts", None) or read("num_experts", 128),
        experts_per_token=read("num_experts_per_tok", 8),
        router_normalized=read("norm_topk_prob", False),
        rope=read_rope(read, sizes["max_positions"]),
        windows=(window,) * sizes["n_layers"] if window else (),
    )
    read.finish(ignored=_IGNORED_KEYS | {"num_experts", "sliding_window"}, neutral=_NEUTRAL)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return common.sizes_to_hf(config, MODEL_TYPE, "Qwen3MoeForCausalLM") | {
        "moe_intermediate_size": config.d_mlp,
        "attention_bias": config.attention_bias,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.router_normalized,
        "use_sliding_window": bool(config.windows),
        "sliding_window": max(config.windows, default=None),
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    bias = config.attention_bias
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(),
        *common.attention_rows(qkv_bias=bias, out_bias=bias),
        *common.qk_norm_rows("X", "X"),
        *expert_rows(),
    ]


def expert_rows() -> list[ParamRow]:
    expert = LAYER + "mlp.experts.{expert}."
    return [
        layer_row("router", "DE", LAYER + "mlp.gate.weight"),
        layer_row("gate", "EDF", expert + "gate_proj.weight"),
        layer_row("up", "EDF", expert + "up_proj.weight"),
        layer_row("down", "EFD", expert + "down_proj.weight", "linear", "residual"),
    ]
