"""The Llama family (Llama 1–3.x and models of the same form): config mapping and tensor names.

Source: transformers' ``modeling_llama.py`` and ``configuration_llama.py`` for the meaning of each
key; the defaults below are those of ``LlamaConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json, in its v4 or v5 spelling.

    Raises:
      ValueError: a key that is neither handled, ignored nor at its default, or a wrong value.
    """
    read = HFConfigReader(values, "LlamaConfig")
    n_heads = read("num_attention_heads", 32)
    d_model = read("hidden_size", 4096)
    max_positions = read("max_position_embeddings", 2048)
    head_dim = read("head_dim", None) or d_model // n_heads
    config = TransformerConfig(
        family=MODEL_TYPE,
        vocab_size=read("vocab_size", 32_000),
        d_model=d_model,
        n_layers=read("num_hidden_layers", 32),
        n_heads=n_heads,
        n_kv_heads=read("num_key_value_heads", None) or n_heads,
        head_dim=head_dim,
        d_mlp=read("intermediate_size", 11_008),
        max_positions=max_positions,
        norm_eps=read("rms_norm_eps", 1e-6),
        activation=read.activation("hidden_act", "silu"),
        tied_embeddings=read("tie_word_embeddings", False),
        attention_bias=read("attention_bias", False),
        mlp_bias=read("mlp_bias", False),
        initializer_range=read("initializer_range", 0.02),
        rope=read.rope(max_positions),
        bos_token_id=read.token_id("bos_token_id"),
        eos_token_id=read.token_id("eos_token_id"),
    )
    read.finish(ignored={"pretraining_tp", "attention_dropout"})
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The config.json (v5 spelling) of a model of this family."""
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = config.rope.original_max_positions
    if config.rope.kind == "llama3":
        rope["low_freq_factor"] = config.rope.low_freq_factor
        rope["high_freq_factor"] = config.rope.high_freq_factor
    if config.rope.kind == "yarn":
        rope["beta_fast"] = config.rope.beta_fast
        rope["beta_slow"] = config.rope.beta_slow
        rope["truncate"] = config.rope.truncate
        if config.rope.attention_factor:
            rope["attention_factor"] = config.rope.attention_factor
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "initializer_range": config.initializer_range,
        "rope_parameters": rope,
        "rope_theta": config.rope.theta,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "dtype": config.dtype,
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    """Every parameter of the model."""
    rows = [
        ParamRow(("embedding",), "VD", "model.embed_tokens.weight", "same"),
        ParamRow(("final_norm",), "D", "model.norm.weight", "same", "ones"),
        *(_layer_row(*row) for row in _LAYER_ROWS),
    ]
    if config.attention_bias:
        rows += [_layer_row(*row) for row in _ATTENTION_BIAS_ROWS]
    if config.mlp_bias:
        rows += [_layer_row(*row) for row in _MLP_BIAS_ROWS]
    if not config.tied_embeddings:
        rows.append(ParamRow(("output_head",), "DV", "lm_head.weight"))
    return rows


def _layer_row(name: str, dims: str, hf_name: str, *rest: str) -> ParamRow:
    return ParamRow(("layers", name), "N" + dims, "model.layers.{layer}." + hf_name, *rest)


_LAYER_ROWS = [
    ("attention_norm", "D", "input_layernorm.weight", "same", "ones"),
    ("query", "DHX", "self_attn.q_proj.weight"),
    ("key", "DKX", "self_attn.k_proj.weight"),
    ("value", "DKX", "self_attn.v_proj.weight"),
    ("attention_out", "HXD", "self_attn.o_proj.weight", "linear", "residual"),
    ("mlp_norm", "D", "post_attention_layernorm.weight", "same", "ones"),
    ("gate", "DF", "mlp.gate_proj.weight"),
    ("up", "DF", "mlp.up_proj.weight"),
    ("down", "FD", "mlp.down_proj.weight", "linear", "residual"),
]
_ATTENTION_BIAS_ROWS = [
    ("query_bias", "HX", "self_attn.q_proj.bias", "same", "zeros"),
    ("key_bias", "KX", "self_attn.k_proj.bias", "same", "zeros"),
    ("value_bias", "KX", "self_attn.v_proj.bias", "same", "zeros"),
    ("attention_out_bias", "D", "self_attn.o_proj.bias", "same", "zeros"),
]
_MLP_BIAS_ROWS = [
    ("gate_bias", "F", "mlp.gate_proj.bias", "same", "zeros"),
    ("up_bias", "F", "mlp.up_proj.bias", "same", "zeros"),
    ("down_bias", "D", "mlp.down_proj.bias", "same", "zeros"),
]
