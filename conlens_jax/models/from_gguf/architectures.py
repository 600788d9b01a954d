"""The architectures of GGUF files: their metadata as the config.json of one of our families.

An architecture needs a row in :data:`ARCHITECTURES`: the family, the keys that its config.json has
besides the shared ones, and how llama.cpp's converter changed the tensors.

Source: llama.cpp's ``conversion`` folder, and ``src/models`` for what a file does not contain.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from conlens_jax.models.from_gguf.header import GGUFFile
from conlens_jax.models.hf_config import FULL, SLIDING

Values = dict[str, Any]
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that belong to the rotation, and end up in config.json."""
# Keys that do not change what the network computes, with all values or with one. Those of other
# parts of a model that sees or hears are ignored.
_BOOKKEEPING = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type"}
_NEUTRAL = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_count": 0,
    "nextn_predict_layers": 0,
    "rope.scaling.attn_factor": 1.0,
}
OTHER_PARTS = ("v.", "mm.", "a.")
"""How the names of tensors of these other parts begin."""
_KEYS_OF_OTHER_PARTS = ("vision.", "mm.", "audio.")
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_LENGTH = 1.0, 4.0, 8192


class Keys:
    """The metadata of a file's architecture; records which were read.

    Numbers that are stored in 32 bits have the shortest form that gives the same 32 bits: 1e-05,
    not 9.999999747378752e-06.
    """

    def __init__(self, file: GGUFFile):
        self.file = file
        self.prefix = file.architecture + "."
        self.read: set[str] = set()
        self.missing: list[str] = []

    def __call__(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        value = self.file.metadata.get(self.prefix + key, default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str, default: Any = None) -> Any:
        """One value, which may be given for each layer; without a default it must be there."""
        value = self(key, default)
        if value is None:
            self.missing.append(self.prefix + key)
            return 1
        values = value if isinstance(value, list) else [value]
        if len(set(values)) > 1:
            raise ValueError(f"{self.file.path}: {self.prefix}{key} differs between layers")
        return values[0]

    def finish(self) -> None:
        """Raises ValueError for keys that are missing, or that were not read."""
        problems = [f"missing: {key}" for key in self.missing]
        for whole, value in self.file.metadata.items():
            key = whole.removeprefix(self.prefix)
            known = whole == key or key in self.read | _BOOKKEEPING
            known |= key in _NEUTRAL and value == _NEUTRAL[key]
            if not known and not key.startswith(_KEYS_OF_OTHER_PARTS):
                problems.append(f"not known: {whole}={str(value)[:60]}")
        if problems:
            raise ValueError(
                f"{self.file.path}: the metadata do not describe a model that is supported:\n"
                + "\n".join(f"  - {problem}" for problem in problems)
            )


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


def _shared(keys: Keys) -> Values:
    """Llama's keys."""
    width, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    head_dim = keys("attention.key_length", width // heads)
    if keys("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{keys.file.path}: keys and values of heads differ in width")
    return {
        "hidden_size": width,
        "num_hidden_layers": keys.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.need("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": keys.need("feed_forward_length"),
        "max_position_embeddings": keys.need("context_length"),
        "rms_norm_eps": keys("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": _rope(keys, head_dim),
    }


def _rope(keys: Keys, head_dim: int) -> Values:
    """``rope_parameters`` of config.json."""
    rope: Values = {"rope_type": "default", "rope_theta": keys("rope.freq_base", 10_000.0)}
    dims = keys("rope.dimension_count", head_dim)
    if dims != head_dim:
        rope["partial_rotary_factor"] = dims / head_dim
    kind, factor = keys("rope.scaling.type", "none"), keys("rope.scaling.factor", 1.0)
    length = keys("rope.scaling.original_context_length")
    factor = keys("rope.scale_linear", factor)
    if kind == "yarn":
        rope |= {"rope_type": kind, "factor": factor}
        rope |= {"original_max_position_embeddings": length} if length else {}
        for name in ("beta_fast", "beta_slow"):
            rope |= {name: value} if (value := keys(f"rope.scaling.yarn_{name}")) else {}
    elif factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    if "rope_freqs.weight" in keys.file.tensors:
        rope |= _llama3_scaling(keys, rope["rope_theta"], dims, length or _LLAMA3_LENGTH)
    return rope


def _llama3_scaling(keys: Keys, theta: float, dims: int, length: int) -> Values:
    """The scaling whose divisors of the frequencies a file has as a tensor."""
    divisors = keys.file.array("rope_freqs.weight").astype(np.float64)
    if np.all(divisors == 1):
        return {}
    factor = round(float(divisors.max()), 4)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dims, 2) / dims)
    low, high = _LLAMA3_LOW, _LLAMA3_HIGH
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    if divisors.shape != smooth.shape or not np.allclose(
        divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4
    ):
        raise ValueError(
            f"{keys.file.path}: rope_freqs.weight is not Llama 3's scaling from {length:,} "
            "positions, which is the only one of this kind that is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def _llama(keys: Keys) -> Values:
    tensors = keys.file.tensors
    return _shared(keys) | {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _mixtral(keys: Keys) -> Values:
    return _shared(keys) | {
        "num_local_experts": keys.need("expert_count"),
        "num_experts_per_tok": keys.need("expert_used_count"),
    }


def _biased(keys: Keys) -> Values:
    return _shared(keys) | {"attention_bias": "blk.0.attn_q.bias" in keys.file.tensors}


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
    values = _shared(keys)
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
    values, file = _shared(keys), keys.file
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
    values = _shared(keys) | {epsilon: keys("attention.layer_norm_epsilon", 1e-5)}
    del values["rms_norm_eps"]
    values["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return values


def _olmo(keys: Keys) -> Values:
    values = _shared(keys) | {"clip_qkv": keys("attention.clamp_kqv")}
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
    values = _shared(keys)
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
    "qwen2": Architecture("qwen2", _shared),
    "qwen3": Architecture("qwen3", _biased),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe),
    "gemma2": Architecture("gemma2", _gemma2),
    "gemma3": Architecture("gemma3_text", _gemma3),
    "phi3": Architecture("phi3", _phi3),
    "olmo2": Architecture("olmo2", _biased),
    # Files of this kind have the architecture olmo2.
    "olmo3": Architecture("olmo3", _olmo3),
    "olmoe": Architecture("olmoe", _olmoe),
    "gemma": Architecture("gemma", _shared),
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
