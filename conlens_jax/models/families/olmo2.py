"""OLMo 2: norms at the outputs of attention and MLP, and of queries and keys over all heads.

Source: transformers' ``modeling_olmo2.py`` and ``configuration_olmo2.py``; arXiv:2501.00656.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "olmo2"
NORMS = {"norm_in_fp32": True, "pre_norms": False, "post_norms": True, "qk_norm": "width"}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Olmo2Config")
    sizes = common.read_sizes(
        read,
        vocab_size=50_304,
        d_model=4096,
        d_mlp=11_008,
        n_layers=32,
        n_heads=32,
        n_kv_heads=None,
        max_positions=2048,
        norm_eps=1e-5,
        eos=50_279,
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        **NORMS,
        activation=read.activation("hidden_act", "silu"),
        attention_bias=read("attention_bias", False),
        rope=read_rope(read, sizes["max_positions"]),
    )
    read.finish(ignored=common.IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return common.sizes_to_hf(config, MODEL_TYPE, "Olmo2ForCausalLM") | {
        "attention_bias": config.attention_bias
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    return [
        *common.end_rows(config),
        *common.attention_rows(qkv_bias=config.attention_bias, out_bias=config.attention_bias),
        *common.qk_norm_rows("HX", "KX"),
        common.norm_row("attention_post_norm", "post_attention_layernorm"),
        *common.gated_mlp_rows(),
        common.norm_row("mlp_post_norm", "post_feedforward_layernorm"),
    ]
