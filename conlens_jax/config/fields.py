"""Fields of the configuration by their dotted names, such as ``"model.layer"``."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from conlens_jax.config.settings import ExperimentConfig


def field_names(kind: type = ExperimentConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted field name, for example ``"model.layer"``, and every section's."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        yield name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from field_names(hints[field.name], name + ".")


def unknown_field_message(name: str) -> str:
    """One line that names an unknown field and the valid one nearest to it."""
    close = difflib.get_close_matches(name, list(field_names()), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown config field {name!r}{hint}"


def lookup(config: ExperimentConfig, dotted: str) -> Any:
    """The value of a dotted field name."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value
