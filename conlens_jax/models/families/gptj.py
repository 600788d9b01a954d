"""GPT-J: attention and MLP in parallel after one layer norm, a part of each head rotated,
neighbour with neighbour, a bias at the output head.

Source: transformers' ``modeling_gptj.py`` and ``configuration_gptj.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import RopeConfig, TransformerConfig

MODEL_TYPE = "gptj"
IGNORED = (r".*\.attn\.(masked_)?bias",)
_LAYER = "transformer.h.{layer}."
_NAMES = {
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rope_parameters": None,
    "rope_theta": None,
}
_IGNORED_KEYS = {
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "scale_attn_weights"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    *("summary_first_dropout", "gradient_checkpointing", "rotary"),
}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "GPTJConfig", _NAMES)
    sizes = common.read_sizes(
        read,
        vocab_size=50_400,
        d_model=4096,
        d_mlp=None,
        n_layers=28,
        n_heads=16,
        n_kv_heads=None,
        max_positions=2048,
        norm_eps=1e-5,
        bos=50_256,
        eos=50_256,
    )
    rotated = read("rotary_dim", 64)
    if not rotated or rotated > sizes["head_dim"]:
        read.problems.append(
            f"rotary_dim={rotated} must be from 2 to the width of a head, {sizes['head_dim']}"
        )
    # The next number above the ratio: its product with the width is not rounded below rotary_dim.
    fraction = math.nextafter((rotated or 0) / sizes["head_dim"], 1.0)
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        norm="layer",
        norm_in_fp32=True,
        parallel_residual=True,
        shared_norm=True,
        activation=read.activation("activation_function", "gelu_new"),
        gated_mlp=False,
        mlp_bias=True,
        rope=RopeConfig(fraction=fraction, interleaved=True),
    )
    read.finish(ignored=_IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "GPTJForCausalLM", _NAMES)
    return values | {"rotary_dim": int(config.head_dim * config.rope.fraction)}


def param_table(config: TransformerConfig) -> list[ParamRow]:
    mlp = _LAYER + "mlp."
    return [
        *common.end_rows(config, "transformer.wte", "transformer.ln_f", head_bias=True),
        *common.layer_norm_rows("attention_norm", _LAYER + "ln_1"),
        *common.attention_rows(within=_LAYER + "attn.", out="out_proj"),
        *common.plain_mlp_rows(mlp + "fc_in", mlp + "fc_out", bias=True),
    ]
