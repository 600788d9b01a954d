"""The Llama family (Llama 1–3.x and models of the same form).

Source: transformers' ``modeling_llama.py`` and ``configuration_llama.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "llama"


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json, in its v4 or v5 spelling.

    Raises:
      ValueError: a key that is neither handled, ignored nor at its default, or a wrong value.
    """
    read = HFConfigReader(values, "LlamaConfig")
    sizes = common.read_sizes(
        read,
        vocab_size=32_000,
        d_model=4096,
        d_mlp=11_008,
        n_layers=32,
        n_heads=32,
        n_kv_heads=None,
        max_positions=2048,
        bos=1,
        eos=2,
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        activation=read.activation("hidden_act", "silu"),
        attention_bias=read("attention_bias", False),
        mlp_bias=read("mlp_bias", False),
        rope=read_rope(read, sizes["max_positions"]),
    )
    read.finish(ignored=common.IGNORED_KEYS | {"pretraining_tp"})
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The config.json (v5 spelling) of a model of this family."""
    return common.sizes_to_hf(config, MODEL_TYPE, "LlamaForCausalLM") | {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    """Every parameter of the model."""
    bias = config.attention_bias
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(),
        *common.attention_rows(qkv_bias=bias, out_bias=bias),
        *common.gated_mlp_rows(bias=config.mlp_bias),
    ]
