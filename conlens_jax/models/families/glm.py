"""GLM (glm-4-9b-chat): Llama with biases of queries, keys and values, half of each head rotated,
neighbour with neighbour, and gate and up in one tensor.

Source: transformers' ``modeling_glm.py`` and ``configuration_glm.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "glm"
# Also of a file with null.
_EOS = (151_329, 151_336, 151_338)


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    return read_config(HFConfigReader(values, "GlmConfig"), MODEL_TYPE)


def read_config(read: HFConfigReader, family: str, **switches: Any) -> TransformerConfig:
    sizes = common.read_sizes(
        read,
        vocab_size=151_552,
        d_model=4096,
        d_mlp=13_696,
        n_layers=40,
        n_heads=32,
        n_kv_heads=2,
        head_dim=128,
        max_positions=131_072,
        norm_eps=1.5625e-7,
    )
    rope = read_rope(read, sizes["max_positions"], fraction=0.5)
    config = TransformerConfig(
        family=family,
        **sizes | {"eos_token_ids": sizes["eos_token_ids"] or _EOS},
        **switches,
        activation=read.activation("hidden_act", "silu"),
        attention_bias=read("attention_bias", True),
        rope=dataclasses.replace(rope, interleaved=True),
    )
    read.finish(ignored=common.IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig, architecture: str = "GlmForCausalLM") -> dict[str, Any]:
    values = common.sizes_to_hf(config, config.family, architecture)
    # 1.0, a whole head, is written too: the default is a half.
    values["rope_parameters"]["partial_rotary_factor"] = config.rope.fraction
    # transformers' default id can be beyond a smaller vocabulary.
    return values | {"attention_bias": config.attention_bias, "pad_token_id": None}


def param_table(config: TransformerConfig) -> list[ParamRow]:
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(),
        *common.attention_rows(qkv_bias=config.attention_bias),
        *common.fused_mlp_rows(),
    ]
