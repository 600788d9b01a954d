"""OLMo 3: OLMo 2 with a window in three of four layers, whose rotation may be another one.

Source: transformers' ``modeling_olmo3.py`` and ``configuration_olmo3.py``; arXiv:2512.13961.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common, olmo2
from conlens_jax.models.hf_config import HFConfigReader, layer_types_to_hf
from conlens_jax.models.hf_rope import read_ropes, ropes_to_hf
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "olmo3"
param_table = olmo2.param_table


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Olmo3Config")
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
    window = read("sliding_window", 4096)
    rope, local = read_ropes(read, sizes["max_positions"], theta=500_000.0)
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        **olmo2.NORMS,
        activation=read.activation("hidden_act", "silu"),
        attention_bias=read("attention_bias", False),
        rope=rope,
        local_rope=local,
        windows=read.windows(sizes["n_layers"], window, lambda layer: (layer + 1) % 4 != 0),
    )
    read.finish(ignored=common.IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return common.sizes_to_hf(config, MODEL_TYPE, "Olmo3ForCausalLM") | {
        "attention_bias": config.attention_bias,
        "rope_parameters": ropes_to_hf(config),
        **layer_types_to_hf(config.windows, config.n_layers),
    }
