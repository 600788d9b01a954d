"""Parameters of layers that are smaller than the largest: where their numbers are among zeros.

A parameter is one array over all layers. Where a layer has narrower heads, fewer key-value heads, a
narrower MLP, or does not have the parameter at all, the rest of its part is zero. Every gradient of
these zeros is zero too, since each is multiplied with another of them on the way to the output: so
they stay zero in training, and the network computes what it would without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from conlens_jax.models.transformer_config import TransformerConfig


def used_places(dims: str, layer: int, config: TransformerConfig) -> tuple[np.ndarray, ...] | None:
    """Along each dimension, the places of the numbers that a layer has; None if it has all."""
    used, stored = config.dim_sizes_of(layer), config.dim_sizes
    if all(used[dim] == stored[dim] for dim in dims):
        return None
    return tuple(_places(dim, used[dim], stored[dim]) for dim in dims)


def _places(dim: str, used: int, stored: int) -> np.ndarray:
    if dim != "X":
        return np.arange(used)
    # The rotation turns entry i of the first half with entry i of the second.
    half = np.arange(used // 2)
    return np.concatenate([half, stored // 2 + half])


def spread(value: np.ndarray, dims: str, layer: int, config: TransformerConfig) -> np.ndarray:
    """A layer's own numbers, among the zeros of the stored array."""
    places = used_places(dims, layer, config)
    if places is None:
        return value
    stored = np.zeros([config.dim_sizes[dim] for dim in dims], value.dtype)
    stored[np.ix_(*places)] = value
    return stored


def gathered(stored: np.ndarray, dims: str, layer: int, config: TransformerConfig) -> np.ndarray:
    """The inverse of :func:`spread`."""
    places = used_places(dims, layer, config)
    return stored if places is None else stored[np.ix_(*places)]


def used_mask(dims: str, layers: Sequence[int], config: TransformerConfig) -> np.ndarray | None:
    """Which numbers of a parameter [N, *dims] are a layer's own; None if all are.

    Args:
      layers: those that have the parameter.
    """
    if not config.layer_shapes and len(layers) == config.n_layers:
        return None
    sizes = config.dim_sizes
    mask = np.zeros([config.n_layers, *(sizes[dim] for dim in dims)], bool)
    for layer in layers:
        own = np.ones([config.dim_sizes_of(layer)[dim] for dim in dims], bool)
        mask[layer] = spread(own, dims, layer, config)
    return None if mask.all() else mask


def used_count(dims: str, layers: Sequence[int], config: TransformerConfig) -> int:
    """How many numbers of a parameter are a layer's own."""
    sizes = map(config.dim_sizes_of, layers)
    return sum(math.prod(size[dim] for dim in dims) for size in sizes)
