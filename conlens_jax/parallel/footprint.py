"""Numbers and bytes of a tree of arrays, in total and per device.

Leaves are arrays or ``jax.ShapeDtypeStruct``; one without a sharding is whole on every device.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jaxtyping import PyTree


def count(tree: PyTree) -> int:
    """Numbers in all leaves; an int8 matrix counts without its scales."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def total_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, each counted once."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(tree: PyTree) -> int:
    """Bytes per device of all leaves; the same on every device."""

    def part(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(part, jax.tree.leaves(tree)))


def in_units(n_bytes: float) -> str:
    """Bytes in readable units, powers of 1,024: ``1.50 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} TiB"
