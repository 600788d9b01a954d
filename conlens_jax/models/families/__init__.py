"""The families of models, by the ``model_type`` of their config.json.

A family is a short module: the meaning of its config.json (``config_from_hf``, ``config_to_hf``)
and the names of its tensors (``param_table``). The switches of
:class:`~conlens_jax.models.transformer_config.TransformerConfig` define what the network computes;
no other code depends on a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from conlens_jax.models.families import (
    falcon,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm,
    glm4,
    gpt2,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    ministral3,
    mistral,
    mixtral,
    nemotron,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    starcoder2,
)
from conlens_jax.models.families.text_parts import WHOLES, text_part
from conlens_jax.models.transformer_config import TransformerConfig

_MODULES = (
    gpt2,
    gpt_neo,
    gpt_neox,
    llama,
    mistral,
    qwen2,
    qwen3,
    gemma2,
    gemma3,
    gemma4,
    phi3,
    olmo2,
    mixtral,
    qwen3_moe,
    gpt_oss,
    gemma,
    starcoder2,
    olmo,
    olmo3,
    smollm3,
    granite,
    ministral3,
    stablelm,
    nemotron,
    olmoe,
    phi,
    gptj,
    glm,
    glm4,
    opt,
    falcon,
)
FAMILIES: dict[str, ModuleType] = {module.MODEL_TYPE: module for module in _MODULES}
# A family may read files of several types; it writes the first.
_BY_MODEL_TYPE = {
    model_type: module
    for module in _MODULES
    for model_type in getattr(module, "MODEL_TYPES", (module.MODEL_TYPE,))
}


def family_of(config: TransformerConfig) -> ModuleType:
    """The module with ``config_from_hf``, ``config_to_hf`` and ``param_table``."""
    return FAMILIES[config.family]


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """The shape of a model, or of the text part of one that also reads images, from its parsed
    config.json.

    Raises:
      ValueError: unknown ``model_type``, or keys that the family does not support.
    """
    model_type = values.get("model_type")
    values = text_part(values)
    if values.get("model_type") not in _BY_MODEL_TYPE:
        raise ValueError(
            f"config.json: model_type={model_type!r} is not supported{_why(values, model_type)}; "
            f"known families: {', '.join(_BY_MODEL_TYPE)}; text parts of: {', '.join(WHOLES)}"
        )
    return _BY_MODEL_TYPE[values["model_type"]].config_from_hf(values)


# Some of the types that people have; others are named by their model_type alone.
_ENCODERS = frozenset(
    "albert bert camembert deberta deberta-v2 distilbert electra esm eurobert ernie longformer "
    "modernbert mpnet nomic_bert roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl".split()
)
_ENCODER_DECODERS = frozenset(
    "bart blenderbot encoder-decoder led longt5 m2m_100 marian mbart mt5 pegasus t5 t5gemma "
    "umt5 whisper".split()
)


def _why(values: Mapping[str, Any], model_type: Any) -> str:
    """What kind of model it is, for the message."""
    if model_type in _ENCODERS:
        return " (an encoder: it reads in both directions and does not continue a text)"
    if model_type in _ENCODER_DECODERS or values.get("is_encoder_decoder"):
        return " (an encoder with a decoder; only decoder-only models are)"
    if values.get("model_type") != model_type:
        return f" (its text part is of type {values.get('model_type')!r})"
    if "text_config" in values:
        return (
            " (a model of several kinds of input, whose text part is not known to be one of ours)"
        )
    if "auto_map" in values:
        return " (code that comes with a model, auto_map, is never run)"
    return ""
