"""GLM 4 (GLM-4-9B-0414): GLM with norms at the outputs of attention and MLP too.

Source: transformers' ``modeling_glm4.py`` and ``configuration_glm4.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.families import common, glm
from conlens_jax.models.hf_config import HFConfigReader
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

MODEL_TYPE = "glm4"


def config_from_hf(values: Mapping[str, Any]) -> TransformerConfig:
    """Reads config.json; raises ValueError as every family does."""
    return glm.read_config(HFConfigReader(values, "Glm4Config"), MODEL_TYPE, post_norms=True)


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    return glm.config_to_hf(config, "Glm4ForCausalLM")


def param_table(config: TransformerConfig) -> list[ParamRow]:
    return [
        *glm.param_table(config),
        common.norm_row("attention_post_norm", "post_self_attn_layernorm"),
        common.norm_row("mlp_post_norm", "post_mlp_layernorm"),
    ]
