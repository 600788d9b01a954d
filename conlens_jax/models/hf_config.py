"""Reading a Hugging Face config.json so that no key is overlooked.

Every key is handled by the family, ignored on purpose, or at its default; any other is an error
that lists them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.transformer_config import RopeConfig

# Keys that do not change what the network computes: bookkeeping, training-time and generation
# settings that transformers writes beside the architecture.
_BOOKKEEPING = frozenset(
    "_name_or_path _commit_hash _attn_implementation_autoset architectures model_type "
    "transformers_version dtype torch_dtype use_cache pad_token_id bos_token_id eos_token_id "
    "chunk_size_feed_forward id2label label2id problem_type return_dict output_attentions "
    "output_hidden_states initializer_range tokenizer_class task_specific_params "
    "generation_config unsloth_version".split()
)
# Keys of transformers v4 with the only value that we can stand for.
_NEUTRAL = {
    "is_encoder_decoder": False,
    "is_decoder": (False, True),
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "torchscript": False,
    "use_bfloat16": False,
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": None,
    "auto_map": None,
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    },
}


class HFConfigReader:
    """Hands out values of a config.json and remembers which were asked for.

    Args:
      values: the parsed file.
      name: what to call it in messages.
    """

    def __init__(self, values: Mapping[str, Any], name: str):
        self.values = values
        self.name = name
        self.read_keys: set[str] = set()
        self.problems: list[str] = []

    def __call__(self, key: str, default: Any) -> Any:
        self.read_keys.add(key)
        return self.values.get(key, default)

    def activation(self, key: str, default: str) -> str:
        value = self(key, default)
        if value not in _ACTIVATIONS:
            self.problems.append(f"{key}={value!r}: known are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS.get(value, "silu")

    def token_id(self, key: str) -> int | None:
        value = self(key, None)
        return value[0] if isinstance(value, list) else value

    def rope(self, max_positions: int) -> RopeConfig:
        """Both spellings: ``rope_parameters`` (v5), or ``rope_theta`` + ``rope_scaling`` (v4)."""
        theta = self("rope_theta", None)
        scaling = self("rope_parameters", None) or self("rope_scaling", None) or {}
        self.read_keys.add("rope_scaling")
        scaling = dict(scaling)
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        scaling.pop("type", None)
        theta = scaling.pop("rope_theta", None) or theta or 10_000.0
        if scaling.get("partial_rotary_factor") == 1.0:
            scaling.pop("partial_rotary_factor")
        if kind not in _ROPE_KEYS:
            self.problems.append(f"rope type {kind!r}: known are {', '.join(_ROPE_KEYS)}")
            return RopeConfig()
        given = {key: value for key, value in scaling.items() if value is not None}
        unknown = set(given) - _ROPE_KEYS[kind]
        if unknown:
            self.problems.append(f"rope type {kind!r} does not know {', '.join(sorted(unknown))}")
        missing = {"factor"} & _ROPE_KEYS[kind] - set(given)
        if missing:
            self.problems.append(f"rope type {kind!r} needs factor")
        return RopeConfig(
            kind=kind,
            theta=float(theta),
            factor=float(given.get("factor", 1.0)),
            # Dynamic scaling compares with the configured length (transformers ignores the other).
            original_max_positions=int(
                max_positions
                if kind == "dynamic"
                else given.get("original_max_position_embeddings", max_positions)
            ),
            low_freq_factor=float(given.get("low_freq_factor", 1.0)),
            high_freq_factor=float(given.get("high_freq_factor", 4.0)),
            beta_fast=float(given.get("beta_fast") or 32.0),
            beta_slow=float(given.get("beta_slow") or 1.0),
            attention_factor=float(given.get("attention_factor", 0.0)),
            truncate=bool(given.get("truncate", True)),
        )

    def finish(self, ignored: set[str]) -> None:
        """Raises ValueError with all problems: values not understood, and keys nobody read."""
        known = self.read_keys | _BOOKKEEPING | ignored
        for key, value in self.values.items():
            if key in known:
                continue
            if key in _NEUTRAL:
                neutral = _NEUTRAL[key]
                choices = neutral if isinstance(neutral, tuple) else (neutral,)
                if value not in choices:
                    self.problems.append(f"{key}={value!r} is not supported")
                continue
            if value is not None:
                self.problems.append(f"{key}={value!r} is not known")
        if self.problems:
            raise ValueError(
                f"config.json of the model ({self.name}) holds what this port cannot honour:\n"
                + "\n".join(f"  - {problem}" for problem in self.problems)
            )
