"""Reading a Hugging Face config.json so that no key is overlooked.

Every key is handled by the family, ignored on purpose, or at its default; any other is an error
that lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Keys that do not change what the network computes: bookkeeping, training-time and generation
# settings that transformers writes next to the architecture.
_BOOKKEEPING = frozenset(
    "_name_or_path _commit_hash _attn_implementation_autoset architectures model_type "
    "transformers_version dtype torch_dtype use_cache pad_token_id bos_token_id eos_token_id "
    "chunk_size_feed_forward id2label label2id problem_type return_dict output_attentions "
    "output_hidden_states initializer_range tokenizer_class task_specific_params "
    "generation_config unsloth_version cache_implementation num_labels tie_last_hidden_states "
    # Of files that a model's own code came with; transformers knows these models itself.
    "auto_map".split()
)
# Keys of transformers v4 with the only value that is supported.
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
    "per_layer_config": (None, {}),
    "is_causal": True,
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
SLIDING, FULL = "sliding_attention", "full_attention"


class HFConfigReader:
    """Returns values of a config.json and records which were read.

    Args:
      values: the parsed file.
      name: what to call it in messages.
      names: the family's own names of Llama's keys; None for a key that it does not have, which
        then has its default.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        name: str,
        names: Mapping[str, str | None] | None = None,
    ):
        self.values = values
        self.name = name
        self.names = names or {}
        self.read_keys: set[str] = set()
        self.problems: list[str] = []

    def __call__(self, key: str, default: Any) -> Any:
        key = self.names.get(key, key)
        if key is None:
            return default
        self.read_keys.add(key)
        return self.values.get(key, default)

    def activation(self, key: str, default: str) -> str:
        value = self(key, default)
        if value not in _ACTIVATIONS:
            self.problems.append(f"{key}={value!r}: known are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS.get(value, "silu")

    def token_id(self, key: str, default: int | None = None) -> int | None:
        """One id; the first of a list."""
        return next(iter(self.token_ids(key, default)), None)

    def token_ids(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """The ids of a key whose value is one id, a list of them or null."""
        try:
            return parse_token_ids(self(key, default), key)
        except ValueError as error:
            self.problems.append(str(error))
            return ()

    def windows(
        self,
        n_layers: int,
        window: int | None,
        has_window: Callable[[int], bool],
    ) -> tuple[int, ...]:
        """The window of each layer, by ``layer_types`` or (where that is absent) ``has_window``."""
        default = [SLIDING if has_window(layer) else FULL for layer in range(n_layers)]
        types = self("layer_types", None) or default
        if len(types) != n_layers or set(types) - {SLIDING, FULL}:
            self.problems.append(
                f"layer_types={types!r} must name {SLIDING!r} or {FULL!r} for each of the "
                f"{n_layers} layers"
            )
            return ()
        if SLIDING in types and not window:
            self.problems.append(f"sliding_window={window!r}: layer_types has {SLIDING!r} layers")
            return ()
        windows = tuple(window if kind == SLIDING else 0 for kind in types)
        return windows if any(windows) else ()

    def finish(self, ignored: set[str], neutral: Mapping[str, Any] | None = None) -> None:
        """Raises ValueError with all problems: unsupported values, and keys that were not read.

        Args:
          ignored: keys that do not change what the family computes.
          neutral: keys with the only value, or a tuple of the values, that is supported.
        """
        known, neutral_of = self.read_keys | _BOOKKEEPING | ignored, _NEUTRAL | dict(neutral or {})
        for key, value in self.values.items():
            if key in known:
                continue
            if key in neutral_of:
                only = neutral_of[key]
                choices = only if isinstance(only, tuple) else (only,)
                if value not in choices:
                    self.problems.append(f"{key}={value!r} is not supported")
                continue
            if value is not None:
                self.problems.append(f"{key}={value!r} is not known")
        if self.problems:
            raise ValueError(
                f"config.json of the model ({self.name}) has unsupported keys or values:\n"
                + "\n".join(f"  - {problem}" for problem in self.problems)
            )


def parse_token_ids(value: Any, key: str) -> tuple[int, ...]:
    """The ids of a value that is one id, a list of them or null, without duplicates, in order.

    Raises:
      ValueError: anything else.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(id) is int for id in ids):
        raise ValueError(f"{key}={value!r} must be a token id, a list of token ids or null")
    return tuple(dict.fromkeys(ids))


def token_ids_to_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    return (list(ids) if len(ids) > 1 else ids[0]) if ids else None


def layer_types_to_hf(windows: tuple[int, ...], n_layers: int) -> dict[str, Any]:
    """The keys that set which layers have a window."""
    types = [SLIDING if window else FULL for window in windows or (0,) * n_layers]
    return {"layer_types": types, "sliding_window": max(windows, default=0) or None}


def activation_to_hf(name: str) -> str:
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)
