"""GPT-2: learned positions, layer norms with biases, a plain MLP, fused query, key and value.

Source: transformers' ``modeling_gpt2.py`` and ``configuration_gpt2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families.common import bias_row, head_row, layer_norm_rows, layer_row
from conlens_jax.models.hf_config import HFConfigReader, token_ids_to_hf
from conlens_jax.models.param_table import ParamRow, Piece
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "gpt2"
_LAYER = "transformer.h.{layer}."
_IGNORED_KEYS = {
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "predict_special_tokens"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    *("summary_first_dropout", "gradient_checkpointing"),
    # Scores are fp32 here in any case.
    "reorder_and_upcast_attn",
}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "GPT2Config")
    d_model, n_heads = read("n_embd", 768), read("n_head", 12)
    config = TransformerConfig(
        family=MODEL_TYPE,
        vocab_size=read("vocab_size", 50_257),
        d_model=d_model,
        n_layers=read("n_layer", 12),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_mlp=read("n_inner", None) or 4 * d_model,
        max_positions=read("n_positions", 1024),
        norm="layer",
        norm_eps=read("layer_norm_epsilon", 1e-5),
        norm_in_fp32=True,
        activation=read.activation("activation_function", "gelu_new"),
        gated_mlp=False,
        tied_embeddings=read("tie_word_embeddings", True),
        learned_positions=True,
        rope=None,
        attention_scale=0.0 if read("scale_attn_weights", True) else 1.0,
        scale_by_depth=read("scale_attn_by_inverse_layer_idx", False),
        attention_bias=True,
        mlp_bias=True,
        initializer_range=read("initializer_range", 0.02),
        bos_token_id=read.token_id("bos_token_id", 50_256),
        eos_token_ids=read.token_ids("eos_token_id", 50_256),
    )
    read.finish(ignored=_IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_mlp,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "tie_word_embeddings": config.tied_embeddings,
        "scale_attn_weights": config.attention_scale == 0.0,
        "scale_attn_by_inverse_layer_idx": config.scale_by_depth,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": token_ids_to_hf(config.eos_token_ids),
        "dtype": config.dtype,
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    rows = [
        *end_rows(config),
        *norm_rows(_LAYER),
        layer_row("attention_out", "HXD", _LAYER + "attn.c_proj.weight", "conv1d", "residual"),
        bias_row("attention_out_bias", "D", _LAYER + "attn.c_proj.bias"),
        *mlp_rows(_LAYER, "conv1d"),
    ]
    for index, name in enumerate(("query", "key", "value")):
        piece, fused = Piece(index, ("HX", "HX", "HX")), _LAYER + "attn.c_attn."
        rows += [
            layer_row(name, "DHX", fused + "weight", "conv1d", piece=piece),
            layer_row(name + "_bias", "HX", fused + "bias", "same", "zeros", piece),
        ]
    return rows


def end_rows(config: TransformerConfig) -> list[ParamRow]:
    rows = [
        ParamRow(("embedding",), "VD", "transformer.wte.weight", "same"),
        ParamRow(("position_embedding",), "PD", "transformer.wpe.weight", "same"),
        ParamRow(("final_norm",), "D", "transformer.ln_f.weight", "same", "ones"),
        ParamRow(("final_norm_bias",), "D", "transformer.ln_f.bias", "same", "zeros"),
    ]
    return rows if config.tied_embeddings else [*rows, head_row()]


def norm_rows(layer: str) -> list[ParamRow]:
    return [
        *layer_norm_rows("attention_norm", layer + "ln_1"),
        *layer_norm_rows("mlp_norm", layer + "ln_2"),
    ]


def mlp_rows(layer: str, layout: str) -> list[ParamRow]:
    return [
        layer_row("up", "DF", layer + "mlp.c_fc.weight", layout),
        bias_row("up_bias", "F", layer + "mlp.c_fc.bias"),
        layer_row("down", "FD", layer + "mlp.c_proj.weight", layout, "residual"),
        bias_row("down_bias", "D", layer + "mlp.c_proj.bias"),
    ]
