"""StableLM (3B, 2 1.6B, 2 12B, Zephyr): Llama with layer norms and a part of each head rotated; the
12B with attention and MLP in parallel after one norm, and a norm for each head's query and key.

Source: transformers' ``modeling_stablelm.py`` and ``configuration_stablelm.py``; arXiv:2402.17834.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common
from conlens_jax.models.families.common import LAYER, layer_row
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.hf_rope import read_rope
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "stablelm"
_NAMES = {"rms_norm_eps": "layer_norm_eps"}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "StableLmConfig", _NAMES)
    sizes = common.read_sizes(
        read,
        vocab_size=50_304,
        d_model=2560,
        d_mlp=6912,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        max_positions=4096,
        norm_eps=1e-5,
        bos=0,
        eos=0,
    )
    parallel = read("use_parallel_residual", False)
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        norm="layer",
        norm_in_fp32=True,
        qk_norm="heads" if read("qk_layernorm", False) else "",
        parallel_residual=parallel,
        shared_norm=parallel,
        activation=read.activation("hidden_act", "silu"),
        attention_bias=read("use_qkv_bias", False),
        rope=read_rope(read, sizes["max_positions"], fraction=0.25),
    )
    read.finish(ignored=common.IGNORED_KEYS | {"hidden_dropout"})
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    values = common.sizes_to_hf(config, MODEL_TYPE, "StableLmForCausalLM", _NAMES)
    # 1.0, a whole head, is written too: the default is a quarter.
    values["rope_parameters"]["partial_rotary_factor"] = config.rope.fraction
    return values | {
        "use_qkv_bias": config.attention_bias,
        "qk_layernorm": bool(config.qk_norm),
        "use_parallel_residual": config.parallel_residual,
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    rows = [
        *common.end_rows(config),
        *common.layer_norm_rows("attention_norm", LAYER + "input_layernorm"),
        *common.attention_rows(qkv_bias=config.attention_bias),
        *common.gated_mlp_rows(),
    ]
    if not config.shared_norm:
        rows += common.layer_norm_rows("mlp_norm", LAYER + "post_attention_layernorm")
    if config.qk_norm:
        name = LAYER + "self_attn.{part}_layernorm.norms.{head}.weight"
        rows += [
            layer_row(ours, dims, name.replace("{part}", part), "same", "ones")
            for ours, part, dims in (("query_norm", "q", "HX"), ("key_norm", "k", "KX"))
        ]
    return rows
