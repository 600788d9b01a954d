"""Falcon: attention and MLP in parallel; in 7B after one layer norm and with one key-value head,
in 40B, 180B and 11B (``new_decoder_architecture``) with several of both. ALiBi (Falcon-RW) is
refused.

Source: transformers' ``modeling_falcon.py`` and ``configuration_falcon.py``; arXiv:2311.16867.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.families.common import bias_row, layer_row
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow, Piece
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "falcon"
_LAYER = "transformer.h.{layer}."
_NAMES = {
    "rms_norm_eps": "layer_norm_epsilon",
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": "ffn_hidden_size",
    "hidden_act": "activation",
}
_IGNORED_KEYS = common.IGNORED_KEYS | {"hidden_dropout"}
_NEUTRAL = {
    "alibi": (False, None),
    "apply_residual_connection_post_layernorm": False,
    "n_embed": None,
}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "FalconConfig", _NAMES)
    sizes = common.read_sizes(
        read,
        vocab_size=65_024,
        d_model=4544,
        d_mlp=None,
        n_layers=32,
        n_heads=71,
        n_kv_heads=None,
        max_positions=2048,
        norm_eps=1e-5,
        tied=True,
        bos=11,
        eos=11,
    )
    new, one_key = bool(read("new_decoder_architecture", False)), read("multi_query", True)
    n_kv_heads, n_norms = read("num_kv_heads", None), read("num_ln_in_parallel_attn", None)
    if new:
        sizes["n_kv_heads"] = n_kv_heads or sizes["n_heads"]
    elif one_key:
        sizes["n_kv_heads"] = 1
    bias, parallel = read("bias", False), read("parallel_attn", True) or new
    if n_norms == 2 and parallel and not new:
        read.problems.append(
            "num_ln_in_parallel_attn=2 is not supported without new_decoder_architecture"
        )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        norm="layer",
        norm_in_fp32=True,
        parallel_residual=parallel,
        shared_norm=parallel and (n_norms == 1 or not new),
        activation=read.activation("activation", "gelu"),
        gated_mlp=False,
        attention_bias=bias,
        mlp_bias=bias,
        rope=read_rope(read, sizes["max_positions"]),
    )
    read.finish(ignored=_IGNORED_KEYS, neutral=_NEUTRAL)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "FalconForCausalLM", _NAMES)
    two_norms = config.parallel_residual and not config.shared_norm
    return values | {
        "new_decoder_architecture": two_norms or 1 < config.n_kv_heads < config.n_heads,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "num_kv_heads": config.n_kv_heads,
        "multi_query": config.n_kv_heads == 1,
        "parallel_attn": config.parallel_residual,
        "bias": config.attention_bias,
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    bias, attention, mlp = config.attention_bias, _LAYER + "self_attention.", _LAYER + "mlp."
    norms = "input_layernorm", "post_attention_layernorm"
    if config.parallel_residual and not config.shared_norm:
        norms = "ln_attn", "ln_mlp"
    rows = [
        *common.end_rows(config, "transformer.word_embeddings", "transformer.ln_f"),
        *common.layer_norm_rows("attention_norm", _LAYER + norms[0]),
        layer_row("attention_out", "HXD", attention + "dense.weight", "linear", "residual"),
        *common.plain_mlp_rows(mlp + "dense_h_to_4h", mlp + "dense_4h_to_h", bias=bias),
    ]
    if not config.shared_norm:
        rows += common.layer_norm_rows("mlp_norm", _LAYER + norms[1])
    if bias:
        rows.append(bias_row("attention_out_bias", "D", attention + "dense.bias"))
    fused, parts = attention + "query_key_value.", ("HX", "KX", "KX")
    for index, (name, dims) in enumerate(zip(("query", "key", "value"), parts, strict=True)):
        piece = Piece(index, parts, by="K")
        rows.append(layer_row(name, "D" + dims, fused + "weight", piece=piece))
        if bias:
            rows.append(layer_row(name + "_bias", dims, fused + "bias", "same", "zeros", piece))
    return rows
