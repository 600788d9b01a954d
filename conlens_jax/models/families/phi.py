"""Phi 1, 1.5 and 2: attention and MLP in parallel after one layer norm, a part of each head
rotated, biases everywhere, at the output head too.

Source: transformers' ``modeling_phi.py`` and ``configuration_phi.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.families.common import LAYER
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "phi"
_NAMES = {"rms_norm_eps": "layer_norm_eps"}
_IGNORED_KEYS = common.IGNORED_KEYS | {"resid_pdrop", "embd_pdrop"}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "PhiConfig", _NAMES)
    sizes = common.read_sizes(
        read,
        vocab_size=51_200,
        d_model=2048,
        d_mlp=8192,
        n_layers=24,
        n_heads=32,
        n_kv_heads=None,
        max_positions=2048,
        norm_eps=1e-5,
        bos=1,
        eos=2,
    )
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        norm="layer",
        norm_in_fp32=True,
        qk_norm="head" if read("qk_layernorm", False) else "",
        parallel_residual=True,
        shared_norm=True,
        activation=read.activation("hidden_act", "gelu_new"),
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
        rope=read_rope(read, sizes["max_positions"], fraction=0.5),
    )
    read.finish(ignored=_IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "PhiForCausalLM", _NAMES)
    # 1.0, a whole head, is written too: the default is a half.
    values["rope_parameters"]["partial_rotary_factor"] = config.rope.fraction
    return values | {"qk_layernorm": bool(config.qk_norm)}


def param_table(config: TransformerConfig) -> list[ParamRow]:
    attention = LAYER + "self_attn."
    rows = [
        *common.end_rows(config, "model.embed_tokens", "model.final_layernorm", head_bias=True),
        *common.layer_norm_rows("attention_norm", LAYER + "input_layernorm"),
        *common.attention_rows(qkv_bias=True, out_bias=True, out="dense"),
        *common.plain_mlp_rows(LAYER + "mlp.fc1", LAYER + "mlp.fc2", bias=True),
    ]
    if config.qk_norm:
        rows += common.layer_norm_rows("query_norm", attention + "q_layernorm", "X")
        rows += common.layer_norm_rows("key_norm", attention + "k_layernorm", "X")
    return rows
