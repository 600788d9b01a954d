"""OPT, and Galactica: learned positions from row 2 of their table on, layer norms, a plain MLP.

OPT-350M is another network (norms after the residual addition, narrower embeddings): refused.

Source: transformers' ``modeling_opt.py`` and ``configuration_opt.py``; arXiv:2205.01068.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "opt"
_DECODER = "model.decoder."
_LAYER = _DECODER + "layers.{layer}."
_NAMES = {
    # ε is a constant of transformers' code.
    "rms_norm_eps": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": "ffn_dim",
    "hidden_act": "activation_function",
    "initializer_range": "init_std",
    "rope_parameters": None,
    "rope_theta": None,
}
_IGNORED_KEYS = common.IGNORED_KEYS | {"dropout", "activation_dropout", "layerdrop", "prefix"}
_NEUTRAL = {"do_layer_norm_before": True, "_remove_final_layer_norm": False}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "OPTConfig", _NAMES)
    sizes = common.read_sizes(
        read,
        vocab_size=50_272,
        d_model=768,
        d_mlp=3072,
        n_layers=12,
        n_heads=12,
        n_kv_heads=None,
        max_positions=2048,
        norm_eps=1e-5,
        tied=True,
        bos=2,
        eos=2,
    )
    embedding_width = read("word_embed_proj_dim", None)
    if embedding_width not in (None, sizes["d_model"]):
        read.problems.append(
            f"word_embed_proj_dim={embedding_width} must be hidden_size={sizes['d_model']}: "
            "projected embeddings are not supported"
        )
    bias = read("enable_bias", True)
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        norm="layer",
        norm_in_fp32=True,
        norm_weights=read("layer_norm_elementwise_affine", True),
        activation=read.activation("activation_function", "relu"),
        gated_mlp=False,
        learned_positions=True,
        position_offset=2,
        rope=None,
        attention_bias=bias,
        mlp_bias=bias,
    )
    read.finish(ignored=_IGNORED_KEYS, neutral=_NEUTRAL)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "OPTForCausalLM", _NAMES)
    return values | {
        "word_embed_proj_dim": config.d_model,
        "enable_bias": config.attention_bias,
        "layer_norm_elementwise_affine": config.norm_weights,
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    bias = config.attention_bias
    rows = [
        *common.end_rows(config, _DECODER + "embed_tokens", _DECODER + "final_layer_norm"),
        ParamRow(("position_embedding",), "PD", _DECODER + "embed_positions.weight", "same"),
        *common.layer_norm_rows("attention_norm", _LAYER + "self_attn_layer_norm"),
        *common.layer_norm_rows("mlp_norm", _LAYER + "final_layer_norm"),
        *common.attention_rows(
            qkv_bias=bias, out_bias=bias, within=_LAYER + "self_attn.", out="out_proj"
        ),
        *common.plain_mlp_rows(_LAYER + "fc1", _LAYER + "fc2", bias=bias),
    ]
    is_norm = lambda row: row.path[-1].removesuffix("_bias").endswith("norm")
    return [row for row in rows if config.norm_weights or not is_norm(row)]
