"""StarCoder 2: layer norms with biases, a plain MLP, biases everywhere, a window in every layer.

Source: transformers' ``modeling_starcoder2.py`` and ``configuration_starcoder2.py``;
arXiv:2402.19173.
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

MODEL_TYPE = "starcoder2"
_NAMES = {"rms_norm_eps": "norm_epsilon"}
_IGNORED_KEYS = common.IGNORED_KEYS | {
    *("residual_dropout", "embedding_dropout"),
    # Of the published files; transformers has one kind of each, and does not read them.
    *("mlp_type", "norm_type", "rms_norm_eps"),
}


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "Starcoder2Config", _NAMES)
    sizes = common.read_sizes(
        read,
        vocab_size=49_152,
        d_model=3072,
        d_mlp=12_288,
        n_layers=30,
        n_heads=24,
        n_kv_heads=2,
        max_positions=4096,
        norm_eps=1e-5,
        initializer_range=0.018042,
        tied=True,
        bos=50_256,
        eos=50_256,
    )
    window, bias = read("sliding_window", None), read("use_bias", True)
    config = TransformerConfig(
        family=MODEL_TYPE,
        **sizes,
        norm="layer",
        norm_in_fp32=True,
        activation=read.activation("hidden_act", "gelu_pytorch_tanh"),
        gated_mlp=False,
        attention_bias=bias,
        mlp_bias=bias,
        rope=read_rope(read, sizes["max_positions"]),
        windows=(window,) * sizes["n_layers"] if window else (),
    )
    read.finish(ignored=_IGNORED_KEYS)
    return config


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return common.sizes_to_hf(config, MODEL_TYPE, "Starcoder2ForCausalLM", _NAMES) | {
        "use_bias": config.attention_bias,
        "sliding_window": max(config.windows, default=None),
    }


def param_table(config: TransformerConfig) -> list[ParamRow]:
    bias = config.attention_bias
    return [
        *common.end_rows(config),
        *common.layer_norm_rows("attention_norm", LAYER + "input_layernorm"),
        *common.layer_norm_rows("mlp_norm", LAYER + "post_attention_layernorm"),
        *common.attention_rows(qkv_bias=bias, out_bias=bias),
        *common.plain_mlp_rows(LAYER + "mlp.c_fc", LAYER + "mlp.c_proj", bias=bias),
    ]
