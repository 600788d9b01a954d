"""Mixtral: Mistral with a mixture of experts in place of the MLP.

Source: transformers' ``modeling_mixtral.py`` and ``configuration_mixtral.py``; arXiv:2401.04088.
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

MODEL_TYPE = "mixtral"
_MLP = LAYER + "block_sparse_moe."
_IGNORED_KEYS = common.IGNORED_KEYS | {
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "MixtralConfig")
    sizes = common.read_sizes(
        read,
        vocab_size=32_000,
        d_model=4096,
        d_mlp=14_336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        max_positions=131_072,
        norm_eps=1e-5,
        bos=1,
        eos=2,
    )
    window = read("sliding_window", None)
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        activation=read.activation("hidden_act", "silu"),
        n_experts=read("num_experts", None) or read("num_local_experts", 8),
        experts_per_token=read("num_experts_per_tok", 2),
        rope=read_rope(read, sizes["max_positions"], theta=1_000_000.0),
        windows=(window,) * sizes["n_layers"] if window else (),
    )
    read.finish(ignored=_IGNORED_KEYS | {"num_local_experts"})
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return common.sizes_to_hf(config, MODEL_TYPE, "MixtralForCausalLM") | {
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "sliding_window": max(config.windows, default=None),
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    expert = _MLP + "experts.{expert}."
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(),
        *common.attention_rows(),
        layer_row("router", "DE", _MLP + "gate.weight"),
        layer_row("gate", "EDF", expert + "w1.weight"),
        layer_row("up", "EDF", expert + "w3.weight"),
        layer_row("down", "EFD", expert + "w2.weight", "linear", "residual"),
    ]
