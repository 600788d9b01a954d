"""Rows of a cache on the device."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.data.rows import Rows


@flax.struct.dataclass
class Batch:
    """Rows of the cache on the device; ``examples_B`` numbers them within the global batch."""

    activation_BD: Float[Array, "B D"]
    tokens_BS: Int[Array, "B S"]
    lengths_B: Int[Array, "B"]
    positions_B: Int[Array, "B"]
    examples_B: Int[Array, "B"]

    @property
    def mask_BS(self) -> Bool[Array, "B S"]:
        return jnp.arange(self.tokens_BS.shape[1]) < self.lengths_B[:, None]


def make_batch(
    rows: Rows, sharding: jax.sharding.Sharding, batch_size: int, first_example: int = 0
) -> Batch:
    """Rows on the device, filled up to ``batch_size`` by repeating the last one."""
    arrays = (
        np.asarray(rows.activations_ND, np.float32),
        rows.tokens_NS,
        rows.lengths_N,
        rows.positions_N,
        np.arange(first_example, first_example + len(rows), dtype=np.int32),
    )
    return Batch(*(jax.device_put(filled(array, batch_size), sharding) for array in arrays))


def filled(array: np.ndarray, size: int) -> np.ndarray:
    missing = size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array
