"""The architectures of GGUF files: their metadata as the config.json of one of our families.

An architecture needs a row in :data:`ARCHITECTURES`: the family, the keys that its config.json has
besides the shared ones, and how llama.cpp's converter changed the tensors.

Source: llama.cpp's ``conversion`` folder, and ``src/models`` for what a file does not contain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from conlens_jax.models.from_gguf.header import GGUFFile
from conlens_jax.models.from_gguf.metadata import Keys, Values, shared
from conlens_jax.models.hf_config import FULL, SLIDING


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How the files of an architecture become a folder of a family.

    Attributes:
      model_type: of config.json.
      values: from the metadata to config.json.
      permuted: in each head of the query and the key, the two numbers that rotate together are
        neighbours in the file, and half a head apart in ours.
      names: tensors of a layer whose names :func:`gguf.get_tensor_name_map` does not know, by the
        name of our parameter.
    """

    model_type: str
    values: Callable[[Keys], Values]
    permuted: bool = False
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def config_values(file: GGUFFile) -> tuple[Architecture, Values]:
    """The architecture of a file, and the config.json of the model.

    Raises:
      ValueError: an unknown architecture; keys that are missing or not known.
    """
    keys, name = Keys(file), file.architecture
    for key, other in _TOLD_BY.get(name, {}).items():
        name = other if keys(key) else name
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: the architecture {name!r} is not supported; known are "
            + ", ".join(sorted(ARCHITECTURES.keys() - {"mixtral", "olmo3"}))
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} has no tensor token_embd.weight, so it is no language model")
    found = ARCHITECTURES[name]
    values = {"model_type": found.model_type, **_ends(file), **found.values(keys)}
    keys.finish()
    return found, values


def _ends(file: GGUFFile) -> Values:
    """Vocabulary and special tokens."""
    token = lambda kind: file.metadata.get(f"tokenizer.ggml.{kind}_token_id")
    # Where a turn ends, the text ends too.
    ends = [id for id in (token("eos"), token("eot")) if id is not None]
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": token("bos"),
        "eos_token_id": list(dict.fromkeys(ends)) or None,
        "pad_token_id": token("padding"),
    }


def _llama(keys: Keys) -> Values:
    tensors = keys.file.tensors
    return shared(keys) | {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _mixtral(keys: Keys) -> Values:
    return shared(keys) | {
        "num_local_experts": keys.need("expert_count"),
        "num_experts_per_tok": keys.need("expert_used_count"),
    }


def _biased(keys: Keys) -> Values:
    return shared(keys) | {"attention_bias": "blk.0.attn_q.bias" in keys.file.tensors}


def _qwen3_moe(keys: Keys) -> Values:
    keys.read.add("feed_forward_length")
    width = keys.need("expert_feed_forward_length")
    return _biased(keys) | {
        "moe_intermediate_size": width,
        "num_experts": keys.need("expert_count"),
        "num_experts_per_tok": keys.need("expert_used_count"),
        # Not in the file: llama.cpp always does it.
        "norm_topk_prob": True,
    }


def _olmoe(keys: Keys) -> Values:
    return _biased(keys) | {
        "num_experts": keys.need("expert_count"),
        "num_experts_per_tok": keys.need("expert_used_count"),
    }


def _gemma(keys: Keys, layers_of_27b: int) -> Values:
    """What Gemma 2 and 3 share. The scale of the scores is not in the file: as in llama.cpp, that
    of the largest model, which is known by its number of layers, is an exception."""
    values = shared(keys)
    is_27b = values["num_hidden_layers"] == layers_of_27b
    scale = values["hidden_size"] // values["num_attention_heads"]
    return values | {
        "query_pre_attn_scalar": scale if is_27b else values["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": keys("attention.sliding_window") or None,
        "final_logit_softcapping": keys("final_logit_softcapping"),
    }


def _gemma2(keys: Keys) -> Values:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    caps = {cap: keys(cap, default) for cap, default in caps.items()}
    return _gemma(keys, layers_of_27b=46) | caps | _layer_types(keys, every=2)


def _gemma3(keys: Keys) -> Values:
    values = _gemma(keys, layers_of_27b=62)
    local = {"rope_type": "default", "rope_theta": keys("rope.freq_base_swa", 10_000.0)}
    ropes = {FULL: values["rope_parameters"], SLIDING: local}
    return values | {"rope_parameters": ropes} | _layer_types(keys, every=6)


def _layer_types(keys: Keys, every: int) -> Values:
    """Which layers have a window: all but each ``every``-th."""
    pattern, n_layers = keys("attention.sliding_window_pattern", every), keys.need("block_count")
    if not isinstance(pattern, list):
        pattern = [bool((layer + 1) % pattern) for layer in range(n_layers)]
    return {"layer_types": [SLIDING if window else FULL for window in pattern]}


def _phi3(keys: Keys) -> Values:
    values, file = shared(keys), keys.file
    length = keys("rope.scaling.original_context_length", values["max_position_embeddings"])
    attention = keys("rope.scaling.attn_factor")
    if "rope_factors_short.weight" in file.tensors:
        factors = {
            f"{name}_factor": file.array(f"rope_factors_{name}.weight").tolist()
            for name in ("short", "long")
        }
        values["rope_parameters"] |= {"rope_type": "longrope", **factors}
        values["rope_parameters"] |= {"attention_factor": attention} if attention else {}
    return values | {
        "original_max_position_embeddings": length,
        "sliding_window": keys("attention.sliding_window") or None,
    }


def _gpt_oss(keys: Keys) -> Values:
    values = _qwen3_moe(keys) | {"sliding_window": keys.need("attention.sliding_window")}
    values["intermediate_size"] = values.pop("moe_intermediate_size")
    values["num_local_experts"] = values.pop("num_experts")
    del values["norm_topk_prob"]
    values["rope_parameters"] |= {"truncate": False}
    return values | _layer_types(keys, every=2)


def _layer_normed(keys: Keys, epsilon: str) -> Values:
    """Llama's keys with layer norms, whose ε has the name ``epsilon``, and parts of heads rotated;
    a whole one is stated too, because it is no family's default."""
    values = shared(keys) | {epsilon: keys("attention.layer_norm_epsilon", 1e-5)}
    del values["rms_norm_eps"]
    values["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return values


def _olmo(keys: Keys) -> Values:
    values = shared(keys) | {"clip_qkv": keys("attention.clamp_kqv")}
    keys.read.add("attention.layer_norm_epsilon")  # a constant of the family
    del values["rms_norm_eps"]
    return values


def _olmo3(keys: Keys) -> Values:
    """Layers with a window are rotated without the scaling."""
    values = _biased(keys) | {"sliding_window": keys.need("attention.sliding_window")}
    whole = values["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": whole["rope_theta"]}
    values["rope_parameters"] = {FULL: whole, SLIDING: local}
    return values | _layer_types(keys, every=4)


def _smollm3(keys: Keys) -> Values:
    """Not in the file: in llama.cpp, each fourth layer is not rotated."""
    return _llama(keys) | {"no_rope_layer_interval": 4}


def _granite(keys: Keys) -> Values:
    return _llama(keys) | {
        "embedding_multiplier": keys("embedding_scale", 1.0),
        "residual_multiplier": keys("residual_scale", 1.0),
        "attention_multiplier": keys.need("attention.scale"),
        "logits_scaling": keys("logit_scale", 1.0),
    }


def _ministral3(keys: Keys) -> Values:
    values = shared(keys)
    values["rope_parameters"] |= {
        "mscale": (scale := keys("rope.scaling.yarn_log_multiplier", 1.0)),
        "mscale_all_dim": scale,
        "llama_4_scaling_beta": keys("attention.temperature_scale", 0.0),
    }
    return values


def _phi(keys: Keys) -> Values:
    return _layer_normed(keys, "layer_norm_eps")


def _starcoder2(keys: Keys) -> Values:
    values = _layer_normed(keys, "norm_epsilon")
    del values["rope_parameters"]["partial_rotary_factor"]
    return values | {"use_bias": "blk.0.attn_q.bias" in keys.file.tensors}


def _stablelm(keys: Keys) -> Values:
    tensors, parallel = keys.file.tensors, keys("use_parallel_residual")
    return (
        _layer_normed(keys, "layer_norm_eps")
        | {
            "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
            "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
            # As in llama.cpp: what is not there cannot be applied.
            "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
        }
        | ({} if parallel is None else {"use_parallel_residual": parallel})
    )


def _nemotron(keys: Keys) -> Values:
    tensors = keys.file.tensors
    return _layer_normed(keys, "norm_eps") | {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _glm4(keys: Keys) -> Values:
    values = _biased(keys)
    values["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return values


def _falcon(keys: Keys) -> Values:
    """Of 40B's kind, which has two norms, or of 7B's."""
    values = _layer_normed(keys, "layer_norm_epsilon")
    del values["rope_parameters"]["partial_rotary_factor"], values["head_dim"]
    kv_heads, two_norms = values.pop("num_key_value_heads"), "blk.0.attn_norm_2.weight"
    values["ffn_hidden_size"] = values.pop("intermediate_size")
    return values | {
        "new_decoder_architecture": two_norms in keys.file.tensors,
        "multi_query": kv_heads == 1,
        "num_kv_heads": kv_heads,
        "bias": "blk.0.attn_qkv.bias" in keys.file.tensors,
    }


def _gpt2(keys: Keys) -> Values:
    return {
        "n_embd": keys.need("embedding_length"),
        "n_layer": keys.need("block_count"),
        "n_head": keys.need("attention.head_count"),
        "n_inner": keys.need("feed_forward_length"),
        "n_positions": keys.need("context_length"),
        "layer_norm_epsilon": keys("attention.layer_norm_epsilon", 1e-5),
    }


def _gpt_neox(keys: Keys) -> Values:
    values = _layer_normed(keys, "layer_norm_eps")
    del values["num_key_value_heads"], values["head_dim"]
    return values | {
        "use_parallel_residual": keys("use_parallel_residual", True),
        "hidden_act": "gelu",
    }


_GPT_OSS_NAMES = {
    **{f"{part}": f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")},
    **{f"{part}_bias": f"ffn_{part}_exps.bias" for part in ("gate", "up", "down")},
    "sinks": "attn_sinks.weight",
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _llama, permuted=True),
    # Files of this kind have the architecture llama.
    "mixtral": Architecture("mixtral", _mixtral, permuted=True),
    "qwen2": Architecture("qwen2", shared),
    "qwen3": Architecture("qwen3", _biased),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe),
    "gemma2": Architecture("gemma2", _gemma2),
    "gemma3": Architecture("gemma3_text", _gemma3),
    "phi3": Architecture("phi3", _phi3),
    "olmo2": Architecture("olmo2", _biased),
    # Files of this kind have the architecture olmo2.
    "olmo3": Architecture("olmo3", _olmo3),
    "olmoe": Architecture("olmoe", _olmoe),
    "gemma": Architecture("gemma", shared),
    "olmo": Architecture("olmo", _olmo, permuted=True),
    "smollm3": Architecture("smollm3", _smollm3, permuted=True),
    "granite": Architecture("granite", _granite, permuted=True),
    "mistral3": Architecture("ministral3", _ministral3, permuted=True),
    "phi2": Architecture("phi", _phi),
    "starcoder2": Architecture("starcoder2", _starcoder2),
    "stablelm": Architecture("stablelm", _stablelm),
    "nemotron": Architecture("nemotron", _nemotron),
    "falcon": Architecture("falcon", _falcon),
    "glm4": Architecture("glm4", _glm4),
    "gpt2": Architecture("gpt2", _gpt2),
    "gptneox": Architecture("gpt_neox", _gpt_neox),
    "gpt-oss": Architecture("gpt_oss", _gpt_oss, names=_GPT_OSS_NAMES),
}
"""By ``general.architecture``."""
_TOLD_BY = {
    "llama": {"expert_count": "mixtral"},
    "olmo2": {"attention.sliding_window": "olmo3"},
}
"""Keys that tell another family of the same architecture."""
