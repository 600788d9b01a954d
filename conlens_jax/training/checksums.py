"""A checksum per array of a checkpoint: whether the values read are those saved.

The storage detects missing and truncated files and damage to its index, but not a flipped bit
within the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Name → the sum, modulo 2³², of each element's bits times an odd weight of its position.

    Integer sums do not depend on the order, so the result is the same on any mesh. Computed on the
    devices of the arrays; every process must call it.
    """
    sums = {name: _checksum(leaf) for name, leaf in leaves.items() if _has_bits(leaf)}
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def _has_bits(leaf: Any) -> bool:
    return leaf.dtype.itemsize in _BITS and leaf.dtype.kind != "c"


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        bits = leaf.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.itemsize]).astype(jnp.uint32)
    # By dimension, not flattened: each device sums its own shard.
    weights, stride = jnp.ones(leaf.shape, jnp.uint32), 2
    for axis in reversed(range(leaf.ndim)):
        step = jnp.uint32(stride % 2**32)
        weights += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * step
        stride *= leaf.shape[axis]
    return jnp.sum(bits * weights, dtype=jnp.uint32)
