"""Nemotron 3 and 4, Minitron: layer norms of weight 1 + w, a part of each head rotated, a plain MLP
with the square of relu.

Source: transformers' ``modeling_nemotron.py`` and ``configuration_nemotron.py``; arXiv:2402.16819.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.families.common import LAYER
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "nemotron"
_NAMES = {"rms_norm_eps": "norm_eps"}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "NemotronConfig", _NAMES)
    sizes = common.read_sizes(
        read,
        vocab_size=256_000,
        d_model=6144,
        d_mlp=24_576,
        n_layers=32,
        n_heads=48,
        n_kv_heads=None,
        max_positions=4096,
        norm_eps=1e-5,
        initializer_range=0.0134,
        bos=2,
        eos=3,
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        norm="layer",
        norm_offset=1.0,
        norm_in_fp32=True,
        activation=read.activation("hidden_act", "relu2"),
        gated_mlp=False,
        attention_bias=read("attention_bias", False),
        mlp_bias=read("mlp_bias", False),
        rope=read_rope(read, sizes["max_positions"], fraction=0.5),
    )
    read.finish(ignored=common.IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "NemotronForCausalLM", _NAMES)
    # 1.0, a whole head, is written too: the default is a half.
    values["rope_parameters"]["partial_rotary_factor"] = config.rope.fraction
    return values | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def param_table(config: TransformerConfig) -> list[ParamRow]:
    bias, mlp = config.attention_bias, LAYER + "mlp."
    return [
        *common.end_rows(config),
        *common.layer_norm_rows("attention_norm", LAYER + "input_layernorm", init="zeros"),
        *common.layer_norm_rows("mlp_norm", LAYER + "post_attention_layernorm", init="zeros"),
        *common.attention_rows(qkv_bias=bias, out_bias=bias),
        *common.plain_mlp_rows(mlp + "up_proj", mlp + "down_proj", bias=config.mlp_bias),
    ]
