"""How many weights a token is multiplied with: twice as many FLOPs, attention aside."""

from __future__ import annotations

from conlens_jax.models.families import family_of
from conlens_jax.models.transformer_config import TransformerConfig


def layer_matrix_sizes(config: TransformerConfig) -> dict[str, int]:
    """Weights of a layer's matrices that one token uses, by name: of all layers the mean, without
    the zeros beside smaller ones. In a mixture of experts only the active ones count."""
    sizes = {
        row.path[-1]: row.count(config) // config.n_layers
        for row in family_of(config).param_table(config)
        if row.stacked
        and len(row.layer_shape(config)) > 1
        and not row.path[-1].endswith(("_bias", "_norm"))
    }
    for name in ("gate", "up", "down") if config.n_experts else ():
        sizes[name] = sizes[name] * config.experts_per_token // config.n_experts
    return sizes


def weights_per_token(config: TransformerConfig) -> int:
    """Weights of all layers and of the output head that one new token uses."""
    layer = sum(layer_matrix_sizes(config).values())
    layer_inputs = config.d_model * (config.d_embedding - config.d_model)
    return config.n_layers * layer + layer_inputs + config.d_model * config.vocab_size
