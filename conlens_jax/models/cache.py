"""The key-value cache: an argument and a result, never hidden state."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conlens_jax.models.layer_kinds import NO_POSITION


class KVCache(NamedTuple):
    """Keys (already rotated) and values of n layers in C slots, and each slot's position."""

    keys: Float[Array, "n B K C X"]
    values: Float[Array, "n B K C X"]
    positions_BC: Int[Array, "B C"]


def with_room(cache: KVCache, slots: int) -> KVCache:
    """The cache with ``slots`` empty slots appended."""
    room = lambda array: jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, slots), (0, 0)))
    positions_BC = jnp.pad(cache.positions_BC, ((0, 0), (0, slots)), constant_values=NO_POSITION)
    return KVCache(room(cache.keys), room(cache.values), positions_BC)


def write_slots(
    past: Array, new: Array, slot: Int[Array, ""] | Int[Array, " B"], axis: int
) -> Float[Array, "B ..."]:
    """Writes ``new`` into ``past`` from ``slot`` of ``axis`` on (one for all rows, or one per row).
    A start too close to the end is clamped, as in ``dynamic_update_slice``."""
    update = jax.lax.dynamic_update_slice_in_dim
    if slot.ndim == 0:
        return update(past, new.astype(past.dtype), slot, axis)
    write = lambda row, piece, start: update(row, piece, start, axis - 1)
    return jax.vmap(write)(past, new.astype(past.dtype), slot)


def append(cache: KVCache, keys: Array, values: Array, positions_BS: Array, slot: Array) -> KVCache:
    """The cache with the new tokens' keys and values of all layers from ``slot`` on."""
    # All layers at once, after the scan: so the cache is updated in place, not copied per layer.
    write = jax.vmap(functools.partial(write_slots, axis=2), in_axes=(0, 0, None))
    return KVCache(
        write(cache.keys, keys, slot),
        write(cache.values, values, slot),
        write_slots(cache.positions_BC, positions_BS, slot, axis=1),
    )
