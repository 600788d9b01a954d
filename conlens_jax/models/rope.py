"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with its scaling kinds.

The frequencies follow transformers' ``modeling_rope_utils.py``; parity is tested against it. Two
kinds depend on the longest position of the pass (``dynamic`` and ``longrope``, whose frequencies
change beyond the pretrained length): with these, a pass with a cache equals the whole pass only
while it stays on one side of that length, in transformers as here.
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
) -> tuple[Float[Array, "B S 1 R/2"], Float[Array, "B S 1 R/2"]]:
    """cos and sin of every position's angles, fp32; R/2 of them for the R rotated entries of a
    head."""
    width = head_dim if config.kind == "proportional" else int(head_dim * config.fraction)
    if config.kind == "dynamic":
        frequencies = _dynamic_frequencies(positions_BS, config, width)
    elif config.kind == "longrope":
        frequencies = _longrope_frequencies(positions_BS, config, width)
    else:
        frequencies = jnp.asarray(_frequencies(config, width), jnp.float32)
    angles = positions_BS[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    scale = _attention_factor(config)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x_BSHX: Float[Array, "B S H X"], rotation: tuple[Array, Array], interleaved: bool = False
) -> Float[Array, "B S H X"]:
    """Rotates the pairs (x_i, x_{i + R/2}) of the first R entries of a head, Hugging Face's
    order, or (``interleaved``) the pairs (x_{2i}, x_{2i + 1}), in fp32."""
    cos, sin = rotation
    width = 2 * cos.shape[-1]
    turned = x_BSHX[..., :width].astype(jnp.float32)
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        rotated = [jnp.stack(rotated, axis=-1).reshape(turned.shape)]
    if width < x_BSHX.shape[-1]:
        rotated.append(x_BSHX[..., width:].astype(jnp.float32))
    return jnp.concatenate(rotated, axis=-1).astype(x_BSHX.dtype)


def _frequencies(config: RopeConfig, width: int) -> np.ndarray:
    base = 1.0 / (config.theta ** _exponents(width))
    if config.kind == "linear":
        return base / config.factor
    if config.kind == "llama3":
        return _llama3_frequencies(base, config)
    if config.kind == "yarn":
        return _yarn_frequencies(base, config, width)
    if config.kind == "proportional":
        # Gemma 4: a pair is an entry of each half, and only the first ones are turned.
        turned = np.arange(len(base)) < int(config.fraction * width // 2)
        return np.where(turned, base, 0) / config.factor
    return base


def _exponents(width: int) -> np.ndarray:
    return np.arange(0, width, 2, dtype=np.float32) / width


def _llama3_frequencies(base: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * np.pi / base
    turns = config.original_max_positions / wavelength
    smooth = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * base / config.factor + smooth * base


def _yarn_frequencies(base: np.ndarray, config: RopeConfig, width: int) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp between kept and divided frequencies."""

    def dimension_with(turns: float) -> float:
        return (width * math.log(config.original_max_positions / (turns * 2 * math.pi))) / (
            2 * math.log(config.theta)
        )

    low, high = dimension_with(config.beta_fast), dimension_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return base / config.factor * ramp + base * (1 - ramp)


def _dynamic_frequencies(positions_BS: Array, config: RopeConfig, width: int) -> jax.Array:
    """Dynamic NTK: the base grows with the longest position of the batch beyond pretraining."""
    length = jnp.maximum(jnp.max(positions_BS) + 1, config.original_max_positions)
    ratio = length.astype(jnp.float32) / config.original_max_positions
    stretch = config.factor * ratio - (config.factor - 1)
    theta = config.theta * stretch ** (width / (width - 2))
    return 1.0 / (theta ** _exponents(width))


def _longrope_frequencies(positions_BS: Array, config: RopeConfig, width: int) -> jax.Array:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): one divisor per frequency, from one list
    within the pretrained length and from another beyond it."""
    base = 1.0 / (config.theta ** _exponents(width))
    short, long = (
        jnp.asarray(base / np.asarray(factors, np.float32), jnp.float32)
        for factors in (config.short_factors, config.long_factors)
    )
    return jnp.where(jnp.max(positions_BS) + 1 > config.original_max_positions, long, short)


def _attention_factor(config: RopeConfig) -> float:
    if config.kind not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor:
        return config.attention_factor
    if config.kind == "yarn":
        return yarn_scale(config.factor)
    if config.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_positions))


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor of cos and sin; ``weight`` is called mscale in config.json."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def query_growth(
    positions_BS: Int[Array, "B S"], growth: float, every: int
) -> Float[Array, "B S 1 1"]:
    """1 + β ln(1 + ⌊p / every⌋), fp32: Llama 4's factor of the query at position p, here as in
    Ministral 3."""
    steps = (positions_BS // every).astype(jnp.float32)
    return 1.0 + growth * jnp.log(1.0 + steps)[:, :, None, None]
