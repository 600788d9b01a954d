"""The metadata of a GGUF file, and what most architectures share in them: Llama's keys of a
config.json, and the rotation.

Source: llama.cpp's ``conversion`` folder, and ``src/models`` for what a file does not contain.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from conlens_jax.models.from_gguf.header import GGUFFile

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


def shared(keys: Keys) -> Values:
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
