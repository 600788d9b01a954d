"""A forward pass in which one vector of each row's residual stream is another one."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conlens_jax.models.cache import KVCache
from conlens_jax.models.layer_kinds import Layers, layer_count, slice_layers
from conlens_jax.models.transformer import run_layers, run_part
from conlens_jax.models.transformer_config import TransformerConfig


@flax.struct.dataclass
class Swap:
    """What stands in place of activations.

    Attributes:
      indices_B: which token of each row.
      activations_BD: the vectors that take the place of its residual stream.
      boundary: the number of blocks before it; see :mod:`~conlens_jax.models.hooks`.
    """

    indices_B: Int[Array, "B"]
    activations_BD: Float[Array, "B D"]
    boundary: int = flax.struct.field(pytree_node=False)


def run_with_swap(
    layers: Layers,
    x_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    swap: Swap | None,
    *,
    config: TransformerConfig,
    keep_cache: bool = False,
) -> tuple[Float[Array, "B S D"], KVCache | None]:
    """:func:`~conlens_jax.models.transformer.run_layers` of all layers, with a swap between two."""
    if swap is None:
        return run_layers(layers, x_BSD, positions_BS, config=config, keep_cache=keep_cache)
    lower = slice_layers(layers, 0, swap.boundary)
    upper = slice_layers(layers, swap.boundary, layer_count(layers))
    settings = dict(config=config, keep_cache=keep_cache)
    x_BSD, below, beside = run_part(lower, x_BSD, positions_BS, **settings)
    rows = jnp.arange(len(x_BSD))
    x_BSD = x_BSD.at[rows, swap.indices_B].set(swap.activations_BD.astype(x_BSD.dtype))
    x_BSD, above, _ = run_part(upper, x_BSD, positions_BS, beside=beside, **settings)
    if below is None or above is None:  # without layers there is no cache
        return x_BSD, below or above
    join = lambda name: jnp.concatenate([getattr(below, name), getattr(above, name)])
    return x_BSD, KVCache(join("keys"), join("values"), positions_BS)
