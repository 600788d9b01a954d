"""The families of models, by the ``model_type`` of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from conlens_jax.models.families import llama
from conlens_jax.models.transformer_config import TransformerConfig

FAMILIES: dict[str, ModuleType] = {module.MODEL_TYPE: module for module in (llama,)}


def family_of(config: TransformerConfig) -> ModuleType:
    """The module with ``config_from_hf``, ``config_to_hf`` and ``param_table``."""
    return FAMILIES[config.family]


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """The shape of a model from its parsed config.json.

    Raises:
      ValueError: unknown ``model_type``, or keys that the family cannot honour.
    """
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type={model_type!r} is not supported; known families: "
            + ", ".join(FAMILIES)
        )
    return FAMILIES[model_type].config_from_hf(values)
