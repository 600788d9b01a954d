"""GPT-NeoX (Pythia): attention and MLP in parallel, a part of each head rotated, layer norms.

Source: transformers' ``modeling_gpt_neox.py`` and ``configuration_gpt_neox.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families.common import bias_row, head_row, layer_norm_rows, layer_row
from conlens_jax.models.hf_config import HFConfigReader, activation_to_hf, token_ids_to_hf
from conlens_jax.models.hf_rope import read_rope, rope_to_hf
from conlens_jax.models.param_table import ParamRow, Piece
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "gpt_neox"
# The head's name in transformers v5; files have the older one.
RENAMES = ((r"^(gpt_neox\.)?lm_head\.", "embed_out."),)
IGNORED = (r".*\.attention\.(masked_)?bias", r".*\.attention\.rotary_emb\.inv_freq")
_LAYER = "gpt_neox.layers.{layer}."
_IGNORED_KEYS = {
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "gradient_checkpointing"),
}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "GPTNeoXConfig")
    d_model, n_heads = read("hidden_size", 6144), read("num_attention_heads", 64)
    max_positions = read("max_position_embeddings", 2048)
    theta, fraction = read("rotary_emb_base", 10_000.0), read("rotary_pct", 0.25)
    config = TransformerConfig(
        family=MODEL_TYPE,
        vocab_size=read("vocab_size", 50_432),
        d_model=d_model,
        n_layers=read("num_hidden_layers", 44),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_mlp=read("intermediate_size", 24_576),
        max_positions=max_positions,
        norm="layer",
        norm_eps=read("layer_norm_eps", 1e-5),
        norm_in_fp32=True,
        parallel_residual=read("use_parallel_residual", True),
        activation=read.activation("hidden_act", "gelu"),
        gated_mlp=False,
        tied_embeddings=read("tie_word_embeddings", False),
        attention_bias=read("attention_bias", True),
        mlp_bias=True,
        rope=read_rope(read, max_positions, theta=theta, fraction=fraction),
        initializer_range=read("initializer_range", 0.02),
        bos_token_id=read.token_id("bos_token_id", 0),
        eos_token_ids=read.token_ids("eos_token_id", 2),
    )
    read.finish(ignored=_IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "hidden_act": activation_to_hf(config.activation),
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.attention_bias,
        # 1.0, a whole head, is written too: the default is a quarter.
        "rope_parameters": rope_to_hf(config.rope)
        | {"partial_rotary_factor": config.rope.fraction},
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": token_ids_to_hf(config.eos_token_ids),
        "dtype": config.dtype,
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    rows = [
        ParamRow(("embedding",), "VD", "gpt_neox.embed_in.weight", "same"),
        ParamRow(("final_norm",), "D", "gpt_neox.final_layer_norm.weight", "same", "ones"),
        ParamRow(("final_norm_bias",), "D", "gpt_neox.final_layer_norm.bias", "same", "zeros"),
        *layer_norm_rows("attention_norm", _LAYER + "input_layernorm"),
        *_attention_rows(config),
        *layer_norm_rows("mlp_norm", _LAYER + "post_attention_layernorm"),
        layer_row("up", "DF", _LAYER + "mlp.dense_h_to_4h.weight"),
        bias_row("up_bias", "F", _LAYER + "mlp.dense_h_to_4h.bias"),
        layer_row("down", "FD", _LAYER + "mlp.dense_4h_to_h.weight", "linear", "residual"),
        bias_row("down_bias", "D", _LAYER + "mlp.dense_4h_to_h.bias"),
    ]
    return rows if config.tied_embeddings else [*rows, head_row("embed_out.weight")]


def _attention_rows(config: TransformerConfig) -> list[ParamRow]:
    """Query, key and value are joined head by head."""
    name = _LAYER + "attention.dense."
    rows = [layer_row("attention_out", "HXD", name + "weight", "linear", "residual")]
    if config.attention_bias:
        rows.append(bias_row("attention_out_bias", "D", name + "bias"))
    fused = _LAYER + "attention.query_key_value."
    for index, part in enumerate(("query", "key", "value")):
        piece = Piece(index, ("HX", "HX", "HX"), by="H")
        rows.append(layer_row(part, "DHX", fused + "weight", piece=piece))
        if config.attention_bias:
            rows.append(layer_row(part + "_bias", "HX", fused + "bias", "same", "zeros", piece))
    return rows
