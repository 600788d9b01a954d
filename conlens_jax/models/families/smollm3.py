"""SmolLM 3: Llama without rotation in every fourth layer.

Source: transformers' ``modeling_smollm3.py`` and ``configuration_smollm3.py``; arXiv:2501.18795
(layers without positions).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common, llama, qwen2
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "smollm3"
param_table = llama.param_table


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "SmolLM3Config")
    sizes = common.read_sizes(
        read,
        vocab_size=128_256,
        d_model=2048,
        d_mlp=11_008,
        n_layers=36,
        n_heads=16,
        n_kv_heads=4,
        max_positions=32_768,
        tied=True,
        bos=128_000,
        eos=128_001,
    )
    n_layers = sizes["n_layers"]
    rotated = _rotated_layers(read, n_layers)
    window = read("sliding_window", None)
    window = window if read("use_sliding_window", False) else None
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        activation=read.activation("hidden_act", "silu"),
        attention_bias=read("attention_bias", False),
        mlp_bias=read("mlp_bias", False),
        rope=read_rope(read, sizes["max_positions"], theta=2_000_000.0),
        rotated_layers=() if all(rotated) else rotated,
        windows=read.windows(n_layers, window, lambda layer: bool(window) and not rotated[layer]),
    )
    read.finish(ignored=common.IGNORED_KEYS | {"max_window_layers", "pretraining_tp"})
    return config


def _rotated_layers(read: HFConfigReader, n_layers: int) -> tuple[bool, ...]:
    """By ``no_rope_layers``, which has a 1 for a layer that is rotated, or by the interval."""
    every = read("no_rope_layer_interval", 4)
    default = [(layer + 1) % every != 0 for layer in range(n_layers)]
    given = read("no_rope_layers", None) or default
    if len(given) < n_layers:
        read.problems.append(
            f"no_rope_layers={given!r} must have a number for each of the {n_layers} layers"
        )
        given = default
    return tuple(map(bool, given[:n_layers]))


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "SmolLM3ForCausalLM")
    return (
        values
        | qwen2.upper_windows_to_hf(config)
        | {
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "no_rope_layers": [int(kind.rope is not None) for kind in config.layer_kinds],
            # transformers' default id can be beyond a smaller vocabulary.
            "pad_token_id": None,
        }
    )
