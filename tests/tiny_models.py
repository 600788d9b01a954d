"""Tiny random models of every family for tests, with and without transformers.

Every parameter is random, norms and biases too: a norm weight of 1 or a bias of 0 would hide a
port that forgets it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conlens_jax.models.cache import KVCache
from conlens_jax.models.families import config_from_hf, family_of
from conlens_jax.models.hf_io import save_model
from conlens_jax.models.layer_kinds import NO_POSITION
from conlens_jax.models.param_table import Params, build_tree
from conlens_jax.models.transformer_config import TransformerConfig, array_dtype

# config.json of the tiny model: 4 query heads share 2 key-value heads.
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 5
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
# Queries grow twice within the 24 positions of the tests.
_GROWING = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.3,
}
_ROPE_BY_TYPE = {
    "full_attention": _YARN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4}
_GPT2 = {"vocab_size": 48, "n_embd": 32, "n_inner": 40, "n_layer": 3, "n_head": 4}
_ATTENTION_TYPES = [[["global", "local"], 1], [["global"], 1]]
_GPT_NEO = {"num_layers": 3, "num_heads": 4, "attention_types": _ATTENTION_TYPES}
# What each family's tiny model has besides: the switches that make it that family are on.
_TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 64, "layer_norm_epsilon": 1e-3, **_GPT2},
    "gpt_neo": {"window_size": WINDOW, "layer_norm_epsilon": 1e-3, **_GPT_NEO},
    "gpt_neox": {"rotary_pct": 0.5, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 12},
    # As in Gemma 2 below.
    "gemma": {"head_dim": 12, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}
    | {"attn_logit_softcapping": 0.8, "final_logit_softcapping": 2.0, "tie_word_embeddings": True}
    # Its scaled embeddings are large beside a small ε.
    | {"rms_norm_eps": 1e-2},
    "gemma3_text": {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}
    | {"sliding_window_pattern": 2, "tie_word_embeddings": True},
    # The last two of four layers share keys with the first two; heads are 4 or 8 wide.
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        # Scores are not scaled: wider heads would attend to one token each, and amplify rounding.
        "head_dim": 4,
        "global_head_dim": 8,
        "rms_norm_eps": 0.1,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 48,
        "sliding_window": WINDOW,
        "final_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
        "pad_token_id": 3,
    },
    # The last two of three layers are not rotated; the middle one has a window besides.
    "smollm3": {"no_rope_layers": [1, 0, 0], "use_sliding_window": True, "sliding_window": WINDOW}
    | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4}
    | {"attention_multiplier": 0.3, "logits_scaling": 0.7},
    "ministral3": {"sliding_window": 12, "rope_parameters": _GROWING},
    # As the 12B model.
    "stablelm": {"qk_layernorm": True, "use_parallel_residual": True, "layer_norm_eps": 1e-3},
    "nemotron": {"norm_eps": 1e-3},
    "starcoder2": {"sliding_window": WINDOW, "norm_epsilon": 1e-3},
    "phi3": {"sliding_window": WINDOW},
    "olmo": {"clip_qkv": 0.3},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "rope_parameters": _ROPE_BY_TYPE}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 24, "head_dim": 12, **_EXPERTS},
    "olmoe": {"clip_qkv": 1.0, **_EXPERTS},
    "gpt_oss": {"head_dim": 12, "sliding_window": WINDOW, "swiglu_limit": 0.5}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _YARN},
    "phi": {"layer_norm_eps": 1e-3, "qk_layernorm": True},
    "gptj": {"n_positions": 64, "layer_norm_epsilon": 1e-3, "rotary_dim": 6, **_GPT2},
    "glm": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "opt": {"ffn_dim": 40},
    "falcon": {"ffn_hidden_size": 40, "layer_norm_epsilon": 1e-3},
}
# Families whose keys are not Llama's; others ignore or refuse them.
_OWN_KEYS = {
    "gpt2": set(),
    "gpt_neo": {"vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"},
    "gpt_neox": TINY.keys() - {"num_key_value_heads", "rms_norm_eps"},
    "starcoder2": TINY.keys() - {"rms_norm_eps"},
    "stablelm": TINY.keys() - {"rms_norm_eps"},
    "nemotron": TINY.keys() - {"rms_norm_eps"},
    "olmo": TINY.keys() - {"rms_norm_eps"},
    "phi": TINY.keys() - {"rms_norm_eps"},
    "gptj": set(),
    "opt": TINY.keys() - {"intermediate_size", "num_key_value_heads", "rms_norm_eps"},
    "falcon": TINY.keys() - {"intermediate_size", "num_key_value_heads", "rms_norm_eps"},
}
_ALWAYS = {"bos_token_id", "eos_token_id", "pad_token_id"}
_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
_SPREAD = 0.1


def tiny_values(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """config.json of a family's tiny model; ``changes`` are keys of it."""
    keys = _OWN_KEYS.get(model_type, TINY.keys()) | _ALWAYS
    shared = {key: value for key, value in TINY.items() if key in keys}
    return shared | _TINY_FAMILIES[model_type] | {"model_type": model_type} | changes


def tiny_config(model_type: str = "llama", **changes: Any) -> TransformerConfig:
    """The shape of a tiny model; ``changes`` are keys of config.json."""
    return config_from_hf(tiny_values(model_type, **changes))


def random_params(config: TransformerConfig, seed: int = 0) -> Params:
    """Every parameter normal, around 1 where it scales and around 0 elsewhere."""
    rng = np.random.default_rng(seed)

    def value(row) -> np.ndarray:
        noise = _SPREAD * rng.standard_normal(row.shape(config))
        mask = row.used_mask(config)
        used = 1.0 if mask is None else mask
        return (used * (noise + float(row.init == "ones"))).astype(config.dtype)

    table = family_of(config).param_table(config)
    return jax.tree.map(jax.numpy.asarray, build_tree((row.path, value(row)) for row in table))


def random_tokens(batch: int, length: int, *, vocab_size: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, vocab_size, (batch, length), dtype=np.int32)


def empty_cache(config: TransformerConfig, batch: int, slots: int) -> KVCache:
    """Room for ``slots`` tokens in every layer."""
    shape = (config.n_layers, batch, config.n_kv_heads, slots, config.head_dim)
    zeros = jnp.zeros(shape, array_dtype(config))
    return KVCache(zeros, zeros, jnp.full((batch, slots), NO_POSITION, jnp.int32))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word-level tokenizer with exactly ``vocab_size`` ids, as Hugging Face files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*_SPECIAL_TOKENS, *(f"word{i}" for i in range(len(_SPECIAL_TOKENS), vocab_size))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{token.strip('<>')}_token": token for token in _SPECIAL_TOKENS}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_tiny_folder(folder: Path, *, seed: int = 0, **changes: Any) -> TransformerConfig:
    """A whole model folder (weights, config.json, tokenizer) without torch."""
    config = tiny_config(**changes)
    save_model(folder, config, random_params(config, seed))
    write_tokenizer(folder, config.vocab_size)
    return config


def hf_model(model_type: str = "llama", *, seed: int = 0, **changes: Any):
    """transformers' own tiny model in fp32 with every parameter perturbed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**tiny_values(model_type, **changes))
    # Soft caps and sinks exist in the plain form of attention only.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        # A factor of a layer is a buffer to torch.
        buffers = (value for name, value in model.named_buffers() if name.endswith("_scalar"))
        for parameter in (*model.parameters(), *buffers):
            parameter.add_(_SPREAD * torch.randn_like(parameter))
    return model


def hf_forward(
    model,
    tokens: np.ndarray,
    mask: np.ndarray | None = None,
    embeddings: np.ndarray | None = None,
):
    """Logits [B, S, V] and the output of every block [B, n, S, D] of a transformers model.

    Block outputs come from hooks: transformers' last ``hidden_states`` is after the final norm.
    With ``embeddings`` [B, S, D] these go in as ``inputs_embeds``, in place of the tokens; what
    they have beyond the width of the model as ``per_layer_inputs``.
    """
    import torch

    outputs = []

    def keep(_module, _inputs, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in _blocks(model)]
    if embeddings is None:
        arguments = {"input_ids": torch.tensor(tokens, dtype=torch.long)}
    else:
        width, n_layers = model.config.hidden_size, model.config.num_hidden_layers
        arguments = {"inputs_embeds": torch.tensor(embeddings[..., :width])}
        if (own := embeddings[..., width:]).size:
            each = own.reshape(*own.shape[:2], n_layers, -1)
            arguments["per_layer_inputs"] = torch.tensor(each)
    if mask is not None:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        arguments["attention_mask"] = torch.tensor(mask, dtype=torch.long)
        arguments["position_ids"] = torch.tensor(positions, dtype=torch.long)
    with torch.no_grad():
        logits = model(use_cache=False, **arguments).logits
    for hook in hooks:
        hook.remove()
    return logits.float().numpy(), torch.stack(outputs, dim=1).float().numpy()


def _blocks(model):
    """The list of blocks, which every family has under another name."""
    import torch

    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return next(blocks for blocks in lists if len(blocks) == model.config.num_hidden_layers)
