"""One row a case: a family, and the keys of config.json that its tiny model has besides.

Whatever must hold for every family is swept over this table: adding a family means adding rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from tiny_models import WINDOW

from conlens_jax.models.families import FAMILIES


class Case(NamedTuple):
    """``atol``: how far logits and states may be from transformers', fp32."""

    family: str
    changes: dict[str, Any] = {}
    atol: float = 1e-5


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 4.0],
    "long_factor": [2.0, 3.0, 4.0, 8.0],
}


def _rope(**rope: Any) -> dict[str, Any]:
    """A rotation of 8 frequencies, so that each scaling has some to keep and some to stretch."""
    return {"head_dim": 16, "rope_parameters": {"rope_theta": 10_000.0} | rope}


CASES = {
    **{family: Case(family) for family in FAMILIES},
    "llama: one kv head, tied, gelu_tanh": Case(
        "llama",
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "llama: biases, narrow heads, gelu": Case(
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "hidden_act": "gelu"},
    ),
    "llama: wide heads, relu": Case(
        "llama", {"head_dim": 12, "num_key_value_heads": 4, "hidden_act": "relu"}
    ),
    "llama: theta": Case("llama", _rope(rope_type="default", rope_theta=500.0)),
    "llama: linear": Case("llama", _rope(rope_type="linear", factor=4.0)),
    "llama: dynamic": Case(
        "llama", _rope(rope_type="dynamic", factor=3.0) | {"max_position_embeddings": 16}
    ),
    "llama: llama3": Case("llama", _rope(**_LLAMA3)),
    "llama: yarn": Case("llama", _rope(**_YARN)),
    "llama: yarn with its options": Case(
        "llama",
        _rope(**_YARN, attention_factor=0.7, beta_fast=3.0, beta_slow=0.5, truncate=False),
    ),
    "mistral: no window, tied": Case(
        "mistral", {"sliding_window": None, "tie_word_embeddings": True}
    ),
    "qwen2: no window": Case("qwen2", {"use_sliding_window": False}),
    "qwen2: layer_types": Case(
        "qwen2", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    ),
    "qwen3: biases, window": Case(
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
    ),
    "gemma: biases, untied": Case("gemma", {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma2: no caps, untied, biases": Case(
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "gemma3: linear": Case(
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
            "final_logit_softcapping": 3.0,
        },
    ),
    # As the 31B model: several shapes, and nothing beside the residual stream.
    "gemma4: several shapes, biases, untied": Case(
        "gemma4_text",
        {
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "use_bidirectional_attention": "vision",
        },
    ),
    # Keys of the later of two layers; no layer is smaller than another.
    "gemma4: one layer shares, one shape, other rotations": Case(
        "gemma4_text",
        {
            "layer_types": ["sliding_attention"] + ["full_attention"] * 3,
            "num_kv_shared_layers": 1,
            "use_double_wide_mlp": False,
            "global_head_dim": 4,
            "num_global_key_value_heads": None,
            "attention_k_eq_v": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "gpt2: depth scale, tanh gelu, untied": Case(
        "gpt2",
        {
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "gelu_pytorch_tanh",
            "tie_word_embeddings": False,
        },
    ),
    "gpt2: unscaled, relu": Case(
        "gpt2", {"scale_attn_weights": False, "activation_function": "relu"}
    ),
    "gpt_neo: all global, untied": Case(
        "gpt_neo", {"attention_types": [[["global"], 3]], "tie_word_embeddings": False}
    ),
    "gpt_neox: sequential, no attention bias": Case(
        "gpt_neox", {"use_parallel_residual": False, "attention_bias": False}
    ),
    "gpt_neox: whole heads, tied": Case(
        "gpt_neox", {"rotary_pct": 1.0, "tie_word_embeddings": True}
    ),
    "phi3: no window, one kv head": Case(
        "phi3", {"sliding_window": None, "num_key_value_heads": 1}
    ),
    "phi3: longrope within": Case(
        "phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}
    ),
    "phi3: longrope beyond": Case(
        "phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 12}
    ),
    "phi3: partial rotation": Case(
        "phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
    ),
    "smollm3: by the interval, biases": Case(
        "smollm3",
        {"no_rope_layers": None, "no_rope_layer_interval": 2, "layer_types": None}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "granite: biases, tied": Case(
        "granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "ministral3: no window, published rotation, tied": Case(
        "ministral3",
        {"sliding_window": None, "rope_parameters": None, "tie_word_embeddings": True},
    ),
    "stablelm: sequential, biases, whole heads, tied": Case(
        "stablelm",
        {"qk_layernorm": False, "use_parallel_residual": False, "use_qkv_bias": True}
        | {"partial_rotary_factor": 1.0, "tie_word_embeddings": True},
    ),
    "nemotron: biases, whole heads": Case(
        "nemotron", {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 1.0}
    ),
    "starcoder2: no biases, no window": Case(
        "starcoder2", {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False}
    ),
    "olmo: biases, unclipped, tied": Case(
        "olmo", {"attention_bias": True, "clip_qkv": None, "tie_word_embeddings": True}
    ),
    "olmo2: biases, tied": Case("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo3: all windows, one rotation, biases": Case(
        "olmo3", {"layer_types": None, "rope_parameters": None, "attention_bias": True}
    ),
    "mixtral: window, one expert": Case(
        "mixtral", {"sliding_window": WINDOW, "num_experts_per_tok": 1}
    ),
    "qwen3_moe: normalised, window": Case(
        "qwen3_moe",
        {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "olmoe: normalised, unclipped, biases": Case(
        "olmoe", {"norm_topk_prob": True, "clip_qkv": None, "attention_bias": True}
    ),
    "gpt_oss: no attention bias, whole": Case(
        "gpt_oss", {"attention_bias": False, "layer_types": ["full_attention"] * 3}
    ),
    "phi: no norms of queries and keys, tied": Case(
        "phi",
        {
            "qk_layernorm": False,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 1.0,
            "hidden_act": "relu",
        },
    ),
    "gptj: whole heads, tied": Case(
        "gptj", {"rotary_dim": 8, "n_inner": None, "tie_word_embeddings": True}
    ),
    "glm4: no biases, whole heads, tied": Case(
        "glm4",
        {"attention_bias": False, "partial_rotary_factor": 1.0, "tie_word_embeddings": True},
    ),
    "opt: no biases, norms without weights, gelu, tied": Case(
        "opt",
        {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": True,
        },
    ),
    "falcon: new, two norms, biases": Case(
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    ),
    "falcon: new, one norm, untied": Case(
        "falcon",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
    ),
    "falcon: a key for each query, sequential, biases, tied": Case(
        "falcon",
        {
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "ffn_hidden_size": None,
            "tie_word_embeddings": True,
        },
    ),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_family = pytest.mark.parametrize("family", FAMILIES)
