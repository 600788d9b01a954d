"""Fields of the configuration by their dotted names, such as ``"model.layer"``."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from conlens_jax.config.settings import ExperimentConfig


def field_names() -> Iterator[str]:
    """The dotted names of all fields and sections, for example ``"model.layer"``."""
    return iter(field_types())


def field_types(kind: type = ExperimentConfig, prefix: str = "") -> dict[str, type]:
    """The type of every field and section, by its dotted name."""
    types = {}
    for name, hint in typing.get_type_hints(kind).items():
        types[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            types |= field_types(hint, prefix + name + ".")
    return types


def unknown_field_message(name: str) -> str:
    """One line that names an unknown field and the most similar valid one."""
    close = difflib.get_close_matches(name, list(field_names()), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown config field {name!r}{hint}"


def lookup(config: ExperimentConfig, dotted: str) -> Any:
    """The value of a field or section, by its dotted name."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value
