"""GPT-Neo (TinyStories): GPT-2 with separate projections, unscaled scores, and a window in some
layers.

Source: transformers' ``modeling_gpt_neo.py`` and ``configuration_gpt_neo.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import gpt2
from conlens_jax.models.families.common import bias_row, layer_row
from conlens_jax.models.hf_config import HFConfigReader, token_ids_to_hf
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "gpt_neo"
IGNORED = (r".*\.attn\.attention\.(masked_)?bias",)
_LAYER = "transformer.h.{layer}."
_ATTENTION = _LAYER + "attn.attention."
_IGNORED_KEYS = {
    *("attention_dropout", "embed_dropout", "resid_dropout", "classifier_dropout"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    *("summary_first_dropout", "gradient_checkpointing"),
    # Derived from attention_types; transformers computes it again.
    "attention_layers",
}
_LOCAL, _GLOBAL = "local", "global"


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    read = HFConfigReader(values, "GPTNeoConfig")
    d_model, n_heads = read("hidden_size", 2048), read("num_heads", 16)
    n_layers = read("num_layers", 24)
    config = TransformerConfig(
        family=MODEL_TYPE,
        vocab_size=read("vocab_size", 50_257),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_mlp=read("intermediate_size", None) or 4 * d_model,
        max_positions=read("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=read("layer_norm_epsilon", 1e-5),
        norm_in_fp32=True,
        activation=read.activation("activation_function", "gelu_new"),
        gated_mlp=False,
        tied_embeddings=read("tie_word_embeddings", True),
        learned_positions=True,
        rope=None,
        windows=_windows(read, n_layers),
        attention_scale=1.0,
        mlp_bias=True,
        initializer_range=read("initializer_range", 0.02),
        bos_token_id=read.token_id("bos_token_id", 50_256),
        eos_token_ids=read.token_ids("eos_token_id", 50_256),
    )
    read.finish(ignored=_IGNORED_KEYS)
    return config


def _windows(read: HFConfigReader, n_layers: int) -> tuple[int, ...]:
    """From ``[[["global", "local"], 12]]``: the types of some layers, and how often they repeat."""
    given = read("attention_types", None) or [[[_GLOBAL, _LOCAL], 12]]
    types = [kind for kinds, count in given for kind in list(kinds) * count]
    window = read("window_size", 256)
    if len(types) != n_layers or set(types) - {_LOCAL, _GLOBAL}:
        read.problems.append(
            f"attention_types={given!r} must name {_LOCAL!r} or {_GLOBAL!r} for each of the "
            f"{n_layers} layers"
        )
        return ()
    windows = tuple(window if kind == _LOCAL else 0 for kind in types)
    return windows if any(windows) else ()


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    windows = config.windows or (0,) * config.n_layers
    values: dict[str, Any] = {
        "architectures": ["GPTNeoForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_layers": config.n_layers,
        "num_heads": config.n_heads,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "tie_word_embeddings": config.tied_embeddings,
        "attention_types": [[[_LOCAL if window else _GLOBAL for window in windows], 1]],
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": token_ids_to_hf(config.eos_token_ids),
        "dtype": config.dtype,
    }
    return values | ({"window_size": max(windows)} if any(windows) else {})


def param_table(config: TransformerConfig) -> list[ParamRow]:
    out = layer_row("attention_out", "HXD", _ATTENTION + "out_proj.weight", "linear", "residual")
    return [
        *gpt2.end_rows(config),
        *gpt2.norm_rows(_LAYER),
        layer_row("query", "DHX", _ATTENTION + "q_proj.weight"),
        layer_row("key", "DKX", _ATTENTION + "k_proj.weight"),
        layer_row("value", "DKX", _ATTENTION + "v_proj.weight"),
        out,
        bias_row("attention_out_bias", "D", _ATTENTION + "out_proj.bias"),
        *gpt2.mlp_rows(_LAYER, "linear"),
    ]
