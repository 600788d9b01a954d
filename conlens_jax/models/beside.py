"""What goes from layer to layer beside the residual stream, in models that have such: the layers'
own inputs, and the keys and values that later layers share (Gemma 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conlens_jax.models.layer_kinds import LayerIndex, Layers, first_of, span_of
from conlens_jax.models.transformer_config import TransformerConfig


class Beside(NamedTuple):
    """What goes from layer to layer beside the residual stream.

    Attributes:
      inputs_NBSI: the layers' own inputs, of all layers of the model; None in a model without.
      keys, values: of the last layer so far without and with a window; None in a model where no
        layer shares them.
    """

    inputs_NBSI: Float[Array, "N B S I"] | None
    keys: Float[Array, "2 B K S X"] | None
    values: Float[Array, "2 B K S X"] | None

    def at_rows(self, rows_B: Int[Array, "B"], places_Bs: Int[Array, "B s"]) -> Beside:
        """Of these rows of the batch, these places in the sequence."""
        pick = jax.vmap(lambda row, places: jnp.take(row, places, axis=-2), (1, 0), 1)
        return jax.tree.map(lambda leaf: pick(leaf[:, rows_B], places_Bs), self)


def apart(
    layers: Layers, x_BSE: Float[Array, "B S E"], config: TransformerConfig
) -> tuple[Float[Array, "B S D"], Beside | None]:
    """The residual stream at the input of the first layer, and what is beside it."""
    if not (config.d_layer_input or config.n_sharing_layers):
        return x_BSE, None
    if first_of(layers):
        raise ValueError(f"layers from {first_of(layers)} on need what is beside their input")
    batch, length, _ = x_BSE.shape
    x_BSD, inputs, keys = x_BSE, None, None
    if config.d_layer_input:
        x_BSD, inputs = x_BSE[..., : config.d_model], x_BSE[..., config.d_model :]
        inputs = inputs.reshape(batch, length, config.n_layers, config.d_layer_input)
        inputs = jnp.moveaxis(inputs, 2, 0)
    if config.n_sharing_layers:
        shape = (2, batch, config.n_kv_heads, length, config.head_dim)
        keys = jnp.zeros(shape, x_BSE.dtype)
    return x_BSD, Beside(inputs, keys, keys)


def inputs_of(layers: Layers, beside: Beside | None) -> Float[Array, "n B S I"] | None:
    """The own inputs of these layers."""
    inputs = None if beside is None else beside.inputs_NBSI
    return None if inputs is None else inputs[span_of(layers)]


def of_window(newest: Any, index: LayerIndex) -> Any:
    """Of a tree of pairs (without a window, with one), those of a layer."""
    return jax.tree.map(lambda pair: pair[index.has_window], newest)


def with_window(newest: Any, index: LayerIndex, made: Any) -> Any:
    """The pairs, with a layer's own in place of those of :func:`of_window`."""
    if newest is None:
        return None
    put = lambda pair, one: pair.at[index.has_window].set(one.astype(pair.dtype))
    return jax.tree.map(put, newest, made)
