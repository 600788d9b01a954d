"""A number for every array of a checkpoint, which tells whether what is read is what was saved.

The storage notices files that are missing or cut short, and damage to its index; a bit that flips
within the values goes through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Name → the sum, modulo 2³², of every element's bits times an odd number of its own.

    Whole numbers add up to the same in any order, so a mesh makes no difference. Computed where the
    arrays lie; of several processes all have to call it.
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
    # By dimension, not flattened: each device sums what it has.
    weights, stride = jnp.ones(leaf.shape, jnp.uint32), 2
    for axis in reversed(range(leaf.ndim)):
        step = jnp.uint32(stride % 2**32)
        weights += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * step
        stride *= leaf.shape[axis]
    return jnp.sum(bits * weights, dtype=jnp.uint32)
