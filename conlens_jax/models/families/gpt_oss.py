"""gpt-oss: experts with a clamped gate, attention sinks, a window in every second layer, YaRN.

Source: transformers' ``modeling_gpt_oss.py`` and ``configuration_gpt_oss.py``; arXiv:2508.10925.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.families.common import LAYER, bias_row, layer_row
from conlens_jax.models.hf_config import HFConfigReader, layer_types_to_hf
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.mxfp4 import MXFP4
from conlens_jax.models.param_table import ParamRow, Piece
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "gpt_oss"
_MLP = LAYER + "mlp."
_IGNORED_KEYS = common.IGNORED_KEYS | {
    *("output_router_logits", "router_aux_loss_coef", "num_local_experts"),
    # Other spellings in the published files of keys that are read.
    *("experts_per_token", "initial_context_length"),
}
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "GptOssConfig")
    sizes = common.read_sizes(
        read,
        vocab_size=201_088,
        d_model=2880,
        d_mlp=2880,
        n_layers=36,
        n_heads=64,
        n_kv_heads=8,
        head_dim=64,
        max_positions=131_072,
        norm_eps=1e-5,
    )
    window = read("sliding_window", 128)
    quantization = read("quantization_config", None)
    if quantization and quantization.get("quant_method") != MXFP4:
        read.problems.append(f"quantization_config={quantization!r}: only {MXFP4} can be read")
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        norm_in_fp32=True,
        swiglu_limit=read("swiglu_limit", 7.0),
        swiglu_alpha=read("swiglu_alpha", 1.702),
        n_experts=read("num_experts", None) or read("num_local_experts", 128),
        experts_per_token=read("num_experts_per_tok", 4),
        rope=read_rope(read, sizes["max_positions"], theta=150_000.0, scaling=_YARN),
        windows=read.windows(sizes["n_layers"], window, lambda layer: layer % 2 == 0),
        attention_sinks=True,
        attention_bias=read("attention_bias", True),
        mlp_bias=True,
    )
    read.finish(ignored=_IGNORED_KEYS | {"hidden_act"})
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "GptOssForCausalLM")
    return (
        values
        | layer_types_to_hf(config.windows, config.n_layers)
        | {
            "swiglu_limit": config.swiglu_limit,
            "swiglu_alpha": config.swiglu_alpha,
            "num_local_experts": config.n_experts,
            "num_experts_per_tok": config.experts_per_token,
            "attention_bias": config.attention_bias,
        }
    )


def param_table(config: TransformerConfig) -> list[ParamRow]:
    fused, bias = _MLP + "experts.gate_up_proj", config.attention_bias
    # Columns of gate and up alternate.
    gate, up = (Piece(index, ("F", "F"), by="last") for index in (0, 1))
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(),
        *common.attention_rows(qkv_bias=bias, out_bias=bias),
        layer_row("sinks", "H", LAYER + "self_attn.sinks", "same"),
        layer_row("router", "DE", _MLP + "router.weight"),
        bias_row("router_bias", "E", _MLP + "router.bias"),
        layer_row("gate", "EDF", fused, "conv1d", piece=gate),
        layer_row("gate_bias", "EF", fused + "_bias", "same", "zeros", gate),
        layer_row("up", "EDF", fused, "conv1d", piece=up),
        layer_row("up_bias", "EF", fused + "_bias", "same", "zeros", up),
        layer_row("down", "EFD", _MLP + "experts.down_proj", "conv1d", "residual"),
        bias_row("down_bias", "ED", _MLP + "experts.down_proj_bias"),
    ]
