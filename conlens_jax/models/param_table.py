"""One row a parameter: where it is in our tree and in Hugging Face's files, and what it looks like.

Loading, saving, initialisation, sharding and counting all read these rows, so they cannot
disagree. Parameters of the layers are stacked: their first dimension is N, the layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conlens_jax.models.transformer_config import TransformerConfig, array_dtype

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ParamRow:
    """A parameter (for the layers: one parameter of each layer, stacked).

    Attributes:
      path: keys in our tree, for example ``("layers", "query")``.
      dims: dimension letters of our array, for example ``"NDHX"``.
      hf_name: tensor name in the file; ``{layer}`` stands for the layer.
      layout: ``"linear"`` if the file holds torch's [out, in], ``"same"`` if it holds our order
        (a bias flattens its dimensions).
      init: ``"normal"``, ``"residual"`` (normal, smaller with depth), ``"zeros"`` or ``"ones"``.
    """

    path: tuple[str, ...]
    dims: str
    hf_name: str
    layout: str = "linear"
    init: str = "normal"

    @property
    def stacked(self) -> bool:
        return self.dims.startswith("N")

    @property
    def layer_dims(self) -> str:
        return self.dims.removeprefix("N")

    def shape(self, config: TransformerConfig) -> tuple[int, ...]:
        return tuple(config.dim_sizes[dim] for dim in self.dims)

    def layer_shape(self, config: TransformerConfig) -> tuple[int, ...]:
        """Shape of one layer's parameter."""
        return tuple(config.dim_sizes[dim] for dim in self.layer_dims)

    def hf_names(self, config: TransformerConfig) -> list[str]:
        layers = range(config.n_layers) if self.stacked else [0]
        return [self.hf_name.format(layer=layer) for layer in layers]

    def hf_shape(self, config: TransformerConfig) -> tuple[int, ...]:
        """Shape of one tensor of the file."""
        sizes = dict(zip(self.layer_dims, self.layer_shape(config), strict=True))
        if self.layout == "linear":
            inputs, outputs = self.matrix_dims
            return (
                math.prod(sizes[dim] for dim in outputs),
                math.prod(sizes[dim] for dim in inputs),
            )
        if "X" in self.layer_dims:
            return (math.prod(sizes.values()),)
        return tuple(sizes.values())

    def from_hf(self, tensor: np.ndarray, config: TransformerConfig) -> np.ndarray:
        """One tensor of the file as one layer's parameter."""
        tensor = tensor.T if self.layout == "linear" else tensor
        return tensor.reshape(self.layer_shape(config))

    def to_hf(self, param: np.ndarray, config: TransformerConfig) -> np.ndarray:
        """The inverse of :meth:`from_hf`."""
        if self.layout != "linear":
            return np.ascontiguousarray(param.reshape(self.hf_shape(config)))
        outputs, inputs = self.hf_shape(config)
        return np.ascontiguousarray(param.reshape(inputs, outputs).T)

    @property
    def matrix_dims(self) -> tuple[str, str]:
        """Input and output letters of a matrix: HX, KX and F go out of D or come back to it."""
        dims = self.layer_dims
        return (dims[:1], dims[1:]) if dims.startswith("D") else (dims[:-1], dims[-1:])

    def initial(self, key: jax.Array, config: TransformerConfig, shape: tuple[int, ...]) -> Any:
        dtype = array_dtype(config)
        if self.init in ("zeros", "ones"):
            return jnp.full(shape, float(self.init == "ones"), dtype)
        std = config.initializer_range
        if self.init == "residual":
            std /= math.sqrt(2 * config.n_layers)
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def leaf(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def build_tree(leaves: Iterator[tuple[tuple[str, ...], Any]]) -> Params:
    tree: Params = {}
    for path, value in leaves:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def init_params(table: list[ParamRow], config: TransformerConfig, key: jax.Array) -> Params:
    """Random parameters in ``config.dtype``."""
    keys = jax.random.split(key, len(table))
    return build_tree(
        (row.path, row.initial(row_key, config, row.shape(config)))
        for row, row_key in zip(table, keys, strict=True)
    )


def abstract_params(table: list[ParamRow], config: TransformerConfig) -> Params:
    """Shapes and dtypes without memory."""
    dtype = array_dtype(config)
    return build_tree((row.path, jax.ShapeDtypeStruct(row.shape(config), dtype)) for row in table)


def dims_tree(table: list[ParamRow]) -> Params:
    """The dimension letters of each parameter, for the partition table."""
    return build_tree((row.path, row.dims) for row in table)


def count_params(table: list[ParamRow], config: TransformerConfig) -> int:
    return sum(math.prod(row.shape(config)) for row in table)
