"""Gemma 3, its text part: Gemma 2 with a norm of each head's query and key in place of the soft
caps, five layers with a window to one without, and a separate rotation for each kind.

Source: transformers' ``modeling_gemma3.py`` and ``configuration_gemma3.py``; arXiv:2503.19786.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common, gemma2
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_ropes, ropes_to_hf
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "gemma3_text"
_IGNORED_KEYS = common.IGNORED_KEYS | {"hidden_act", "_sliding_window_pattern"}
# transformers has a key for a soft cap of the scores but does not use it.
_NEUTRAL = {"use_bidirectional_attention": (None, False), "attn_logit_softcapping": None}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Gemma3TextConfig")
    sizes = common.read_sizes(
        read,
        vocab_size=262_208,
        d_model=2304,
        d_mlp=9216,
        n_layers=26,
        n_heads=8,
        n_kv_heads=4,
        head_dim=256,
        max_positions=131_072,
        tied=True,
        bos=2,
        eos=1,
    )
    window, every = read("sliding_window", 4096), read("sliding_window_pattern", 6)
    local_theta = read("rope_local_base_freq", None) or 10_000.0
    whole, local = read_ropes(
        read, sizes["max_positions"], theta=1_000_000.0, local_theta=local_theta
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        **gemma2.norms_and_scales(read, sizes["d_model"], final_cap=None),
        qk_norm="head",
        rope=whole,
        local_rope=local,
        windows=read.windows(sizes["n_layers"], window, lambda layer: (layer + 1) % every != 0),
    )
    read.finish(ignored=_IGNORED_KEYS, neutral=_NEUTRAL)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "Gemma3ForCausalLM")
    values |= gemma2.norms_and_scales_to_hf(config)
    return values | {"rope_parameters": ropes_to_hf(config)}


def param_table(config: TransformerConfig) -> list[ParamRow]:
    return [*gemma2.param_table(config), *common.qk_norm_rows("X", "X", "zeros")]
