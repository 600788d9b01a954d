"""Norms of activations, by the switches of the config."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer_config import TransformerConfig


def apply_norm(
    x: Float[Array, "*B D"],
    weights: Params,
    name: str,
    config: TransformerConfig,
    n_dims: int = 1,
    width: Float[Array, ""] | None = None,
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x²) + ε) · (offset + w), the mean in fp32 (Zhang & Sennrich 2019); as a layer
    norm (Ba et al. 2016) of x − mean(x) and with the bias ``<name>_bias``.

    The last ``n_dims`` dimensions of ``x`` are normed together.

    Args:
      name: empty for a norm without a weight in a model whose others have one.
      width: how many entries the mean is over where the others are zero; None: all.
    """
    axes = tuple(range(-n_dims, 0))
    wide = x.astype(jnp.float32)
    if config.norm == "layer":
        wide = wide - jnp.mean(wide, axis=axes, keepdims=True)
    mean = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
    if width is not None:
        mean = mean * (x.shape[-1] / width)
    normal = wide * jax.lax.rsqrt(mean + config.norm_eps)
    if not (config.norm_weights and name):
        return normal.astype(x.dtype)
    weight, bias = weights[name], weights.get(name + "_bias")
    if config.norm_in_fp32:
        weight = weight.astype(jnp.float32)
        bias = None if bias is None else bias.astype(jnp.float32)
    else:
        normal = normal.astype(x.dtype)
    factor = weight + config.norm_offset if config.norm_offset else weight
    normal = normal * jax.lax.broadcast_to_rank(factor, x.ndim)
    if bias is not None:
        normal = normal + jax.lax.broadcast_to_rank(bias, x.ndim)
    return normal.astype(x.dtype)
