"""The whole configuration of a run, as frozen dataclasses.

A config file under ``configs/`` has a ``get_config()`` that returns an
``ml_collections.ConfigDict`` made by :func:`to_config_dict`. The entry point applies the command
line to it and calls :func:`from_config_dict` once. After that call there is no ``ConfigDict``: the
library sees only validated dataclasses, with :class:`ExperimentConfig` as the whole.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from conlens_jax.config.data import (
    GENERATED_CORPORA,
    MODEL_TEXT_FIELDS,
    CorpusConfig,
    DataConfig,
    DumpConfig,
)
from conlens_jax.config.devices import DistributedConfig, LaunchConfig, MeshConfig, ProfileConfig
from conlens_jax.config.evaluation import EvaluateConfig
from conlens_jax.config.fields import field_names, field_types, lookup, unknown_field_message
from conlens_jax.config.lens import LensConfig, LossConfig, ScheduleConfig, constant, schedule
from conlens_jax.config.model import EMBEDDED_MODEL, EmbeddedConfig, ModelConfig
from conlens_jax.config.older import updated
from conlens_jax.config.rules import config_problems
from conlens_jax.config.settings import ExperimentConfig
from conlens_jax.config.target import TargetConfig
from conlens_jax.config.training import (
    BaselineConfig,
    CheckpointConfig,
    ControlConfig,
    JointConfig,
    OptimizerConfig,
    TrainConfig,
    WandbConfig,
    WarmConfig,
)
from conlens_jax.files.paths import PATH_FIELDS, expanded


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem with its field."""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(f"  - {problem}" for problem in self.problems))


def to_config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
    """The locked ``ConfigDict`` that a config file hands to the command line."""
    # Rebuilt, so that a float written as 10 is a float: a flag keeps the type it finds.
    typed = _build(ExperimentConfig, dataclasses.asdict(config), "", [])
    return ml_collections.ConfigDict(dataclasses.asdict(typed)).lock()


def to_json_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Nested plain values, as they are read from ``config.json``."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def with_changes(config: ExperimentConfig, changes: Mapping[str, Any]) -> ExperimentConfig:
    """The config with fields replaced, given by names such as ``"loss.kl.start"``.

    Raises:
      ConfigError: as :func:`from_config_dict`.
    """
    values = to_json_dict(config)
    for dotted, value in changes.items():
        *sections, name = dotted.split(".")
        part = values
        for section in sections:
            part = part.setdefault(section, {})
        part[name] = value
    return from_config_dict(values)


def from_config_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Builds and validates the dataclasses; a leading ``~`` of a path becomes the home folder.
    Recorded configurations of older versions are read too.

    Raises:
      ConfigError: unknown fields, wrong types and impossible values, all in one message.
    """
    problems: list[str] = []
    config = _build(ExperimentConfig, updated(values), "", problems)
    if not problems:
        problems = list(config_problems(config))
    if problems:
        raise ConfigError(problems)
    return config


def _build(kind: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        dotted = prefix + name
        if name not in hints:
            problems.append(unknown_field_message(dotted))
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, Mapping | ml_collections.ConfigDict):
                arguments[name] = _build(hints[name], value, dotted + ".", problems)
            else:
                problems.append(f"{dotted} is a section, not the value {value!r}")
        else:
            arguments[name] = _coerce(hints[name], value, dotted, problems)
            if dotted in PATH_FIELDS and isinstance(value, str):
                arguments[name] = expanded(value)
    return kind(**arguments)


def _coerce(kind: type, value: Any, dotted: str, problems: list[str]) -> Any:
    if dotted == "dump.add_bos" and str(value).lower() in ("true", "false"):
        return str(value).lower()  # older configs have a plain bool
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and isinstance(value, list):  # from JSON
        return tuple(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        problems.append(f"{dotted} must be of type {kind.__name__}, not {value!r}")
    return value
