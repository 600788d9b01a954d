"""Reading a Hugging Face config.json so that no key that matters is overlooked.

Every key is read by the family, known to be harmless, at the value that the family supports, or of
no meaning to transformers either; any other is an error that lists them all.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from conlens_jax.models.hf_keys import HARMLESS, NEUTRAL, default_of, read_by_transformers

# A model's config.json is read by several parts of a command.
_warn_once = functools.cache(logging.getLogger(__name__).warning)
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
        """Raises ValueError with all problems: unsupported values, and keys that transformers reads
        but the family does not. A key that transformers does not read either is named in the log.

        Args:
          ignored: keys that do not change what the family computes.
          neutral: keys with the only value, or a tuple of the values, that is supported. For other
            keys that transformers reads, this is the default of its config class.
        """
        known, supported = self.read_keys | HARMLESS | ignored, NEUTRAL | dict(neutral or {})
        others = {}
        for key, value in self.values.items():
            if key in known:
                continue
            if key in supported:
                only = supported[key]
                if value not in (only if isinstance(only, tuple) else (only,)):
                    self.problems.append(f"{key}={value!r} is not supported")
            elif value is not None:
                others[key] = value
        if others:
            self._judge(others)
        if self.problems:
            raise ValueError(
                f"config.json of the model ({self.name}) has unsupported keys or values:\n"
                + "\n".join(f"  - {problem}" for problem in self.problems)
            )

    def _judge(self, others: Mapping[str, Any]) -> None:
        """Keys that neither the family nor the generic tables know, by what transformers does."""
        try:
            matter = read_by_transformers(self.values["model_type"], others)
            changed = [k for k in others if k in matter and others[k] != default_of(self.values, k)]
        except LookupError:
            self.problems += [
                f"{key}={value!r} is not known, nor is this model_type to the installed "
                "transformers: update it, or remove the key if it does not change the model"
                for key, value in others.items()
            ]
            return
        self.problems += [f"{key}={others[key]!r} is not supported" for key in changed]
        if unread := [key for key in others if key not in matter]:
            _warn_once(
                "config.json (%s): ignored, since transformers does not read them either: %s",
                self.name,
                ", ".join(unread),
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
