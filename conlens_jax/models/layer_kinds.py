"""Masks and rotations of the layers, computed once for each kind of layer in a stack.

A model has one kind of layers, or two that alternate (with a window and without, each with its
rotation). A scan over layers also scans over the number of each layer's kind, and the layer
picks the masks and angles of that kind. Where all layers of a stack are alike there is no number.

The kind of a layer follows from its index in the model, so a part of a stack must know the index
of its first layer: take parts with :func:`slice_layers` only, whose result does. A part is not
copied: M's layers below and above L would otherwise be in memory twice while a step runs. (With
``model.remat="none"`` a backward pass through a part saves each layer's weights as it saves all
else.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.models import rope
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer_config import LayerKind, TransformerConfig

NO_POSITION = jnp.iinfo(jnp.int32).max


@flax.struct.dataclass
class LayerSlice:
    """Some layers of a stack. A scan reads each of them from the whole stack when it is its turn.

    Attributes:
      stack: stacked parameters of all layers of the model.
      own: parameters that only these layers have, such as adapters; the first dimension is
        ``count``.
      first, count: which layers of the stack these are.
    """

    stack: Params
    own: Params
    first: int = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False)


Layers = Params | LayerSlice


def slice_layers(layers: Layers, start: int, stop: int) -> Layers:
    """Layers ``start`` to ``stop`` − 1 of a stack, without a copy of them."""
    if isinstance(layers, LayerSlice):
        own = jax.tree.map(lambda leaf: leaf[start:stop], layers.own)
        return LayerSlice(layers.stack, own, layers.first + start, stop - start)
    return LayerSlice(layers, {}, start, stop - start)


def with_own(layers: Layers, own: Params) -> Layers:
    """The layers with parameters of their own in addition, stacked as they are."""
    if isinstance(layers, LayerSlice):
        return layers.replace(own={**layers.own, **own})
    return {**layers, **own}


def params_of(layers: Layers) -> Params:
    """Stacked parameters of exactly these layers; of a slice, a copy."""
    if not isinstance(layers, LayerSlice):
        return layers
    span = span_of(layers)
    return {**jax.tree.map(lambda leaf: leaf[span], layers.stack), **layers.own}


def scanned(layers: Layers) -> tuple[Any, Callable[[Any], Params]]:
    """What a scan over the layers goes through, and the parameters of a layer from its element."""
    if not isinstance(layers, LayerSlice):
        return layers, lambda weights: weights
    span = span_of(layers)

    def weights_of(element: tuple[Int[Array, ""], Params]) -> Params:
        number, own = element
        pick = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)
        return {**jax.tree.map(pick, layers.stack), **own}

    return (jnp.arange(span.start, span.stop, dtype=jnp.int32), layers.own), weights_of


def first_of(layers: Layers) -> int:
    """The number, in the model, of the first of these layers."""
    return layers.first if isinstance(layers, LayerSlice) else 0


def layer_count(layers: Layers) -> int:
    if isinstance(layers, LayerSlice):
        return layers.count
    return jax.tree.leaves(layers)[0].shape[0]


class MaskAndRope(NamedTuple):
    """Masks and rotations of queries at some positions, for each kind of layer in a stack.

    Attributes:
      rotation: cos and sin of the queries' angles; None where nothing is rotated.
      growth: a factor of the queries; None where there is none.
      mask: which new keys each query sees.
      past_mask: which cached keys each query sees; None without a cache.
    """

    rotation: tuple[Float[Array, "kinds B S 1 R"], Float[Array, "kinds B S 1 R"]] | None
    growth: Float[Array, "kinds B S 1 1"] | None
    mask: Bool[Array, "kinds B S S"]
    past_mask: Bool[Array, "kinds B S C"] | None

    def of(self, index: LayerIndex) -> MaskAndRope:
        """Those of one layer's kind, without the first dimension."""
        kind = 0 if index.kind is None else index.kind
        return jax.tree.map(lambda array: array[kind], self)

    def at_queries(self, start: Int[Array, ""] | int, count: int) -> MaskAndRope:
        """Those of ``count`` queries from the index ``start`` on."""
        pick = lambda array: jax.lax.dynamic_slice_in_dim(array, start, count, axis=2)
        return jax.tree.map(pick, self)


class LayerIndex(NamedTuple):
    """How a layer differs from the others of its stack; stacked over n layers, ``n`` is the first
    dimension.

    Attributes:
      kind: index of its kind; None if there is one kind only.
      scale: its factor of ⟨q, k⟩; None if all layers have the same.
      width: the true width of its heads; None if all layers have ``head_dim``.
      key_heads: for each of the K places in ``n_kv_heads`` that its queries are grouped by, which
        of its keys is there; None if they are in their order in all layers.
      values_are_keys: None if no layer's are.
      shares: whether it has the keys and values of an earlier layer; None if no layer has.
      has_window: whether it has a window, and so which earlier layer's; None as before.
    """

    kind: Int[Array, "*n"] | None = None
    scale: Float[Array, "*n"] | None = None
    width: Float[Array, "*n"] | None = None
    key_heads: Int[Array, "*n K"] | None = None
    values_are_keys: Bool[Array, "*n"] | None = None
    shares: Bool[Array, "*n"] | None = None
    has_window: Int[Array, "*n"] | None = None


def span_of(layers: Layers) -> slice:
    """Which of the model's layers these are."""
    return slice(first_of(layers), first_of(layers) + layer_count(layers))


def mask_and_rope_of(
    span: slice,
    positions_BS: Int[Array, "B S"],
    past_positions_BC: Int[Array, "B C"] | None,
    config: TransformerConfig,
) -> tuple[MaskAndRope, LayerIndex]:
    """Masks and rotations of new tokens at these positions, and the index of each layer.

    Args:
      span: which of the model's layers (:func:`span_of`).
    """
    kinds, scales = config.layer_kinds[span], config.attention_scales[span]
    distinct = list(dict.fromkeys(kinds))
    each = [_mask_and_rope(kind, positions_BS, past_positions_BC, config) for kind in distinct]
    index_N = LayerIndex(
        kind=None if len(distinct) == 1 else jnp.asarray([distinct.index(kind) for kind in kinds]),
        scale=jnp.asarray(scales, jnp.float32) if config.scale_by_depth else None,
        **_shapes_of(range(config.n_layers)[span], config),
    )
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *each), index_N


def _shapes_of(layers: range, config: TransformerConfig) -> dict[str, Array]:
    """The fields of :class:`LayerIndex` for layers of several shapes, or that share keys."""
    fields: dict[str, Array] = {}
    shapes = [config.shape_of(layer) for layer in layers]
    if any(shape.head_dim != config.head_dim for shape in config.layer_shapes):
        fields["width"] = jnp.asarray([shape.head_dim for shape in shapes], jnp.float32)
    most = config.n_kv_heads
    if any(shape.n_kv_heads != most for shape in config.layer_shapes):
        places = [[at * shape.n_kv_heads // most for at in range(most)] for shape in shapes]
        fields["key_heads"] = jnp.asarray(places, jnp.int32)
    if any(config.values_are_keys):
        fields["values_are_keys"] = jnp.asarray([config.values_are_keys[n] for n in layers])
    if config.n_sharing_layers:
        windows = config.windows or (0,) * config.n_layers
        fields["shares"] = jnp.asarray([config.shares(layer) for layer in layers])
        fields["has_window"] = jnp.asarray([int(windows[n] > 0) for n in layers], jnp.int32)
    return fields


def _mask_and_rope(
    kind: LayerKind, positions_BS: Array, past_positions_BC: Array | None, config: TransformerConfig
) -> MaskAndRope:
    mask_BSS = seen_keys(positions_BS, positions_BS, kind.window)
    past_mask_BSC = None
    if past_positions_BC is not None:
        # A cache may contain later tokens than the new ones: these are masked.
        start_B1 = jnp.min(positions_BS, axis=1, keepdims=True)
        past_BC = jnp.where(past_positions_BC < start_B1, past_positions_BC, NO_POSITION)
        past_mask_BSC = seen_keys(positions_BS, past_BC, kind.window)
        past_mask_BSC &= (past_BC != NO_POSITION)[:, None]
    # Padding has the angle of position 0.
    valid_BS = jnp.where(positions_BS == NO_POSITION, 0, positions_BS)
    growth = None
    if config.query_growth:
        every = config.rope.original_max_positions
        growth = rope.query_growth(valid_BS, config.query_growth, every)
    return MaskAndRope(_rotation(kind, valid_BS, config), growth, mask_BSS, past_mask_BSC)


def seen_keys(
    query_positions_BS: Int[Array, "B S"], key_positions_BC: Int[Array, "B C"], window: int
) -> Bool[Array, "B S C"]:
    """Which keys each query sees: those not after it and (with a window) close enough."""
    query_BS1, key_B1C = query_positions_BS[:, :, None], key_positions_BC[:, None]
    seen_BSC = key_B1C <= query_BS1
    return seen_BSC & (query_BS1 - key_B1C < window) if window else seen_BSC


def _rotation(kind: LayerKind, positions_BS: Array, config: TransformerConfig):
    """cos and sin of the tokens' angles. A layer without rotation in a model that has some is
    rotated by 0, which changes no bit."""
    if config.rope is None:
        return None
    cos, sin = rope.rotations(positions_BS, kind.rope or config.rope, kind.head_dim)
    if kind.head_dim < config.head_dim:
        # What is not the layer's own is zero, however it is turned.
        more = [(0, 0)] * 3 + [(0, (config.head_dim - kind.head_dim) // 2)]
        cos, sin = jnp.pad(cos, more, constant_values=1.0), jnp.pad(sin, more)
    return (cos, sin) if kind.rope else (jnp.ones_like(cos), jnp.zeros_like(sin))
