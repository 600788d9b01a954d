"""Shared by the families close to Llama: names of keys in config.json, and names of tensors.

The defaults of a key are those of the family's config class in transformers, so each family passes
its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.hf_config import HFConfigReader, activation_to_hf, token_ids_to_hf
from conlens_jax.models.hf_rope import rope_to_hf
from conlens_jax.models.param_table import ParamRow, Piece
from conlens_jax.models.transformer_config import TransformerConfig

LAYER = "model.layers.{layer}."
IGNORED_KEYS = {"attention_dropout"}


def read_sizes(
    read: HFConfigReader,
    *,
    vocab_size: int,
    d_model: int,
    d_mlp: int | None,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None,
    max_positions: int,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    initializer_range: float = 0.02,
    tied: bool = False,
    bos: int | None = None,
    eos: int | None = None,
) -> dict[str, Any]:
    """The fields read from Llama's keys, with the defaults of a family."""
    d_model, n_heads = read("hidden_size", d_model), read("num_attention_heads", n_heads)
    return {
        "vocab_size": read("vocab_size", vocab_size),
        "d_model": d_model,
        "n_layers": read("num_hidden_layers", n_layers),
        "n_heads": n_heads,
        "n_kv_heads": read("num_key_value_heads", n_kv_heads) or n_heads,
        "head_dim": read("head_dim", head_dim) or d_model // n_heads,
        "d_mlp": read("intermediate_size", d_mlp) or 4 * d_model,
        "max_positions": read("max_position_embeddings", max_positions),
        "norm_eps": read("rms_norm_eps", norm_eps),
        "tied_embeddings": read("tie_word_embeddings", tied),
        "initializer_range": read("initializer_range", initializer_range),
        "bos_token_id": read.token_id("bos_token_id", bos),
        "eos_token_ids": read.token_ids("eos_token_id", eos),
    }


def sizes_to_hf(
    config: TransformerConfig,
    model_type: str,
    architecture: str,
    names: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """The inverse of :func:`read_sizes`, with activation and rotation; ``names`` as in
    :class:`~conlens_jax.models.hf_config.HFConfigReader`."""
    values = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": activation_to_hf(config.activation),
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.initializer_range,
        "rope_parameters": rope_to_hf(config.rope) if config.rope else None,
        "rope_theta": config.rope.theta if config.rope else None,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": token_ids_to_hf(config.eos_token_ids),
        "dtype": config.dtype,
    }
    own = {key: (names or {}).get(key, key) for key in values}
    return {own[key]: value for key, value in values.items() if own[key] is not None}


def layer_row(
    name: str,
    dims: str,
    hf_name: str,
    layout: str = "linear",
    init: str = "normal",
    piece: Piece | None = None,
) -> ParamRow:
    """A parameter of each layer; ``hf_name`` is the whole name."""
    return ParamRow(("layers", name), "N" + dims, hf_name, layout, init, piece)


def norm_row(name: str, hf_name: str, dims: str = "D", init: str = "ones") -> ParamRow:
    return layer_row(name, dims, LAYER + hf_name + ".weight", "same", init)


def bias_row(name: str, dims: str, hf_name: str) -> ParamRow:
    return layer_row(name, dims, hf_name, "same", "zeros")


def layer_norm_rows(name: str, hf_name: str, dims: str = "D", init: str = "ones") -> list[ParamRow]:
    """Weight and bias of a layer norm; ``hf_name`` is the whole name without the last part."""
    weight = layer_row(name, dims, hf_name + ".weight", "same", init)
    return [weight, bias_row(name + "_bias", dims, hf_name + ".bias")]


def end_rows(
    config: TransformerConfig,
    embedding: str = "model.embed_tokens",
    final_norm: str = "model.norm",
    *,
    head_bias: bool = False,
) -> list[ParamRow]:
    """Embedding, final norm, output head; whole names without the last part."""
    rows = [ParamRow(("embedding",), "VD", embedding + ".weight", "same")]
    if config.norm_weights:
        init = "zeros" if config.norm_offset else "ones"
        rows.append(ParamRow(("final_norm",), "D", final_norm + ".weight", "same", init))
        if config.norm == "layer":
            bias = ParamRow(("final_norm_bias",), "D", final_norm + ".bias", "same", "zeros")
            rows.append(bias)
    if head_bias:
        rows.append(ParamRow(("output_head_bias",), "V", "lm_head.bias", "same", "zeros"))
    return rows if config.tied_embeddings else [*rows, head_row()]


def head_row(hf_name: str = "lm_head.weight") -> ParamRow:
    return ParamRow(("output_head",), "DV", hf_name)


def pre_norm_rows(init: str = "ones") -> list[ParamRow]:
    return [
        norm_row("attention_norm", "input_layernorm", init=init),
        norm_row("mlp_norm", "post_attention_layernorm", init=init),
    ]


def attention_rows(
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    within: str = LAYER + "self_attn.",
    out: str = "o_proj",
) -> list[ParamRow]:
    """Separate projections.

    Args:
      within, out: how the names of attention's tensors begin, and that of its output projection.
    """
    parts = {"query": ("q_proj", "HX"), "key": ("k_proj", "KX"), "value": ("v_proj", "KX")}
    weight, bias = (lambda name, kind=kind: f"{within}{name}.{kind}" for kind in ("weight", "bias"))
    rows = [layer_row(part, "D" + dims, weight(name)) for part, (name, dims) in parts.items()]
    rows.append(layer_row("attention_out", "HXD", weight(out), "linear", "residual"))
    if qkv_bias:
        rows += [bias_row(part + "_bias", dims, bias(name)) for part, (name, dims) in parts.items()]
    if out_bias:
        rows.append(bias_row("attention_out_bias", "D", bias(out)))
    return rows


def qk_norm_rows(query_dims: str, key_dims: str, init: str = "ones") -> list[ParamRow]:
    return [
        norm_row("query_norm", "self_attn.q_norm", query_dims, init),
        norm_row("key_norm", "self_attn.k_norm", key_dims, init),
    ]


def fused_mlp_rows() -> list[ParamRow]:
    """An MLP whose file joins gate and up in one tensor."""
    joined, halves = LAYER + "mlp.gate_up_proj.weight", ("F", "F")
    return [
        layer_row("gate", "DF", joined, piece=Piece(0, halves)),
        layer_row("up", "DF", joined, piece=Piece(1, halves)),
        layer_row("down", "FD", LAYER + "mlp.down_proj.weight", "linear", "residual"),
    ]


def plain_mlp_rows(up: str, down: str, *, bias: bool) -> list[ParamRow]:
    """An MLP without a gate; ``up`` and ``down`` are whole names without the last part."""
    rows = [
        layer_row("up", "DF", up + ".weight"),
        layer_row("down", "FD", down + ".weight", "linear", "residual"),
    ]
    if bias:
        rows += [bias_row("up_bias", "F", up + ".bias"), bias_row("down_bias", "D", down + ".bias")]
    return rows


def gated_mlp_rows(*, bias: bool = False) -> list[ParamRow]:
    rows = [
        layer_row("gate", "DF", LAYER + "mlp.gate_proj.weight"),
        layer_row("up", "DF", LAYER + "mlp.up_proj.weight"),
        layer_row("down", "FD", LAYER + "mlp.down_proj.weight", "linear", "residual"),
    ]
    if bias:
        rows += [
            bias_row("gate_bias", "F", LAYER + "mlp.gate_proj.bias"),
            bias_row("up_bias", "F", LAYER + "mlp.up_proj.bias"),
            bias_row("down_bias", "D", LAYER + "mlp.down_proj.bias"),
        ]
    return rows
