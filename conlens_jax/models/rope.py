"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with its scaling kinds.

The frequencies follow transformers' ``modeling_rope_utils.py``; parity is tested against it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from conlens_jax.models.transformer_config import RopeConfig


def rotations(
    positions_BS: Int[Array, "B S"], config: RopeConfig, head_dim: int
) -> tuple[Float[Array, "B S 1 X/2"], Float[Array, "B S 1 X/2"]]:
    """cos and sin of every position's angles, fp32."""
    if config.kind == "dynamic":
        frequencies = _dynamic_frequencies(positions_BS, config, head_dim)
    else:
        frequencies = jnp.asarray(_frequencies(config, head_dim), jnp.float32)
    angles = positions_BS[:, :, None, None].astype(jnp.float32) * frequencies
    scale = _attention_factor(config)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x_BSHX: Float[Array, "B S H X"], rotation: tuple[Array, Array]
) -> Float[Array, "B S H X"]:
    """Rotates the pairs (x_i, x_{i + X/2}), Hugging Face's order; computed in fp32."""
    cos, sin = rotation
    first, second = jnp.split(x_BSHX.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BSHX.dtype)


def _frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    base = 1.0 / (config.theta**exponent)
    if config.kind == "linear":
        return base / config.factor
    if config.kind == "llama3":
        return _llama3_frequencies(base, config)
    if config.kind == "yarn":
        return _yarn_frequencies(base, config, head_dim)
    return base


def _llama3_frequencies(base: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * np.pi / base
    turns = config.original_max_positions / wavelength
    smooth = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * base / config.factor + smooth * base


def _yarn_frequencies(base: np.ndarray, config: RopeConfig, head_dim: int) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp between kept and divided frequencies."""

    def dimension_with(turns: float) -> float:
        return (head_dim * math.log(config.original_max_positions / (turns * 2 * math.pi))) / (
            2 * math.log(config.theta)
        )

    low, high = dimension_with(config.beta_fast), dimension_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return base / config.factor * ramp + base * (1 - ramp)


def _dynamic_frequencies(positions_BS: Array, config: RopeConfig, head_dim: int) -> jax.Array:
    """Dynamic NTK: the base grows with the longest position of the batch beyond pretraining."""
    length = jnp.maximum(jnp.max(positions_BS) + 1, config.original_max_positions)
    ratio = length.astype(jnp.float32) / config.original_max_positions
    stretch = config.factor * ratio - (config.factor - 1)
    theta = config.theta * stretch ** (head_dim / (head_dim - 2))
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / (theta**exponent)


def _attention_factor(config: RopeConfig) -> float:
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor:
        return config.attention_factor
    return 0.1 * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0
