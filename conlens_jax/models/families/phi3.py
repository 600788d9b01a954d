"""Phi-3 and Phi-4-mini: Llama with fused projections, a part of each head rotated, LongRoPE.

Source: transformers' ``modeling_phi3.py`` and ``configuration_phi3.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.families.common import LAYER, layer_row
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow, Piece
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "phi3"
_IGNORED_KEYS = common.IGNORED_KEYS | {"resid_pdrop", "embd_pdrop"}
_NEUTRAL = {
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Phi3Config")
    sizes = common.read_sizes(
        read,
        vocab_size=32_064,
        d_model=3072,
        d_mlp=8192,
        n_layers=32,
        n_heads=32,
        n_kv_heads=None,
        max_positions=4096,
        norm_eps=1e-5,
        bos=1,
        eos=32_000,
    )
    window = read("sliding_window", None)
    # What Phi-3 calls "su" (and, by mistake, "yarn") is LongRoPE.
    rope = read_rope(
        read,
        sizes["max_positions"],
        fraction=1.0,
        original_max_positions=read("original_max_position_embeddings", 4096),
        synonyms={"su": "longrope", "yarn": "longrope"},
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        activation=read.activation("hidden_act", "silu"),
        rope=rope,
        windows=(window,) * sizes["n_layers"] if window else (),
    )
    read.finish(ignored=_IGNORED_KEYS, neutral=_NEUTRAL)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "Phi3ForCausalLM") | {
        "sliding_window": max(config.windows, default=None),
        # transformers' default id can be beyond a smaller vocabulary.
        "pad_token_id": None,
    }
    if config.rope.kind == "longrope":
        values["original_max_position_embeddings"] = config.rope.original_max_positions
    return values


def param_table(config: TransformerConfig) -> list[ParamRow]:
    qkv, out = LAYER + "self_attn.qkv_proj.weight", LAYER + "self_attn.o_proj.weight"
    parts, names = ("HX", "KX", "KX"), ("query", "key", "value")
    return [
        *common.end_rows(config),
        *common.pre_norm_rows(),
        *(
            layer_row(name, "D" + parts[index], qkv, piece=Piece(index, parts))
            for index, name in enumerate(names)
        ),
        layer_row("attention_out", "HXD", out, "linear", "residual"),
        *common.fused_mlp_rows(),
    ]
