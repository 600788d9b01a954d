"""Ministral 3: Mistral with YaRN, and queries that grow with their position.

Source: transformers' ``modeling_ministral3.py`` and ``configuration_ministral3.py``;
arXiv:2601.08584.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common, mistral
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "ministral3"
param_table = mistral.param_table
_GROWTH = "llama_4_scaling_beta"
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    _GROWTH: 0.1,
}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Ministral3Config")
    sizes = common.read_sizes(
        read,
        vocab_size=131_072,
        d_model=4096,
        d_mlp=14_336,
        n_layers=34,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        max_positions=262_144,
        norm_eps=1e-5,
        bos=1,
        eos=2,
    )
    window = read("sliding_window", None)
    given = read("rope_scaling", None) or read("rope_parameters", None) or _ROPE
    rope = read_rope(
        read, sizes["max_positions"], scaling=_ROPE, others={_GROWTH, "max_position_embeddings"}
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        activation=read.activation("hidden_act", "silu"),
        rope=rope,
        query_growth=given.get(_GROWTH) or 0.0,
        windows=(window,) * sizes["n_layers"] if window else (),
    )
    read.finish(ignored=common.IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "Ministral3ForCausalLM")
    values["rope_parameters"][_GROWTH] = config.query_growth
    return values | {"sliding_window": max(config.windows, default=None)}
