"""Granite 3 (the dense models): Llama with factors on embeddings, scores, what a layer adds, and
logits.

Source: transformers' ``modeling_granite.py`` and ``configuration_granite.py``; arXiv:2408.13359.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common, llama
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "granite"
param_table = llama.param_table


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "GraniteConfig")
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
        embedding_scale=float(read("embedding_multiplier", 1.0)),
        residual_scale=float(read("residual_multiplier", 1.0)),
        logit_divisor=float(read("logits_scaling", 1.0)),
        rope=read_rope(read, sizes["max_positions"]),
        attention_scale=float(read("attention_multiplier", 1.0)),
        attention_bias=read("attention_bias", False),
        mlp_bias=read("mlp_bias", False),
    )
    read.finish(ignored=common.IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return common.sizes_to_hf(config, MODEL_TYPE, "GraniteForCausalLM") | {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale,
        "logits_scaling": config.logit_divisor,
    }
