"""One row per parameter: its path in our tree, its name in Hugging Face's files, and its shape.

Loading, saving, initialisation, sharding and counting all read these rows, so they agree.
Parameters of the layers are stacked: their first dimension is N, the layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from conlens_jax.models import layer_shapes
from conlens_jax.models.quantized import Int8Matrix
from conlens_jax.models.transformer_config import TransformerConfig, array_dtype

Params = dict[str, Any]


def leaf_name(path: tuple) -> str:
    """The path of a leaf as a name: ``decoder.base.layers.query``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their names."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One part of a tensor that joins several along its output dimension, the query of a fused
    ``qkv_proj`` for example.

    Attributes:
      index: which of the parts.
      of: dimension letters of all parts, in their order: ``("HX", "KX", "KX")``.
      by: how the parts are joined. ``""``: one after the other. A letter that every part begins
        with: for example, each head contains its share of every part (``"H"``: [H, part, X]), or
        each key-value head, with its queries (``"K"``: [K, part, X]; H is a multiple of K).
        ``"last"``: the parts alternate column by column.
    """

    index: int
    of: tuple[str, ...]
    by: str = ""

    def __post_init__(self):
        starts = ("K", "H") if self.by == "K" else self.by
        if self.by not in ("", "last") and not all(dims.startswith(starts) for dims in self.of):
            raise ValueError(f"Piece.by={self.by!r}: each of {self.of} must begin with it")

    def place(self, sizes: Mapping[str, int]) -> tuple[int, int, slice]:
        """The joined dimension as [groups, width], and this part's slice of each group."""
        parts = [math.prod(sizes[dim] for dim in dims) for dims in self.of]
        groups = {"": 1, "last": parts[self.index]}.get(self.by) or sizes[self.by]
        widths = [part // groups for part in parts]
        start = sum(widths[: self.index])
        return groups, sum(widths), slice(start, start + widths[self.index])


@dataclasses.dataclass(frozen=True)
class ParamRow:
    """A parameter (for the layers: one parameter of each layer, stacked).

    Attributes:
      path: keys in our tree, for example ``("layers", "query")``.
      dims: dimension letters of our array, for example ``"NDHX"``. Experts (E) come right after
        the layer.
      hf_name: tensor name in the file; ``{layer}`` is the layer's index, ``{expert}`` the expert's,
        and ``{head}`` the head's. Without these the file's tensor contains all experts, or heads,
        as its first dimension.
      layout: ``"linear"`` if the file has torch's [out, in], ``"conv1d"`` if [in, out], ``"same"``
        if our order. The dimensions on one side of a matrix are one dimension in the file, and so
        are those of a bias.
      init: ``"normal"``, ``"residual"`` (normal, smaller with depth), ``"zeros"`` or ``"ones"``.
      piece: set if the file's tensor joins several parameters.
      layers: those that have it (:mod:`conlens_jax.models.layer_shapes`); None: all.
    """

    path: tuple[str, ...]
    dims: str
    hf_name: str
    layout: str = "linear"
    init: str = "normal"
    piece: Piece | None = None
    layers: tuple[int, ...] | None = None

    @property
    def stacked(self) -> bool:
        return self.dims.startswith("N")

    @property
    def layer_dims(self) -> str:
        return self.dims.removeprefix("N")

    def shape(self, config: TransformerConfig) -> tuple[int, ...]:
        return _sizes(self.dims, config)

    def layer_shape(self, config: TransformerConfig) -> tuple[int, ...]:
        """Shape of one layer's parameter."""
        return _sizes(self.layer_dims, config)

    def layers_of(self, config: TransformerConfig) -> Sequence[int]:
        """The layers that have it."""
        return range(config.n_layers) if self.layers is None else self.layers

    def count(self, config: TransformerConfig) -> int:
        """How many numbers it has, in all its layers."""
        if not self.stacked:
            return math.prod(self.shape(config))
        return layer_shapes.used_count(self.layer_dims, self.layers_of(config), config)

    def used_mask(self, config: TransformerConfig) -> np.ndarray | None:
        """Which of the numbers in our array are those; None if all are."""
        if not self.stacked:
            return None
        return layer_shapes.used_mask(self.layer_dims, self.layers_of(config), config)

    @property
    def tensor_dims(self) -> str:
        """The letters of our array that one tensor of the file contains."""
        split = "{expert}" in self.hf_name or "{head}" in self.hf_name
        return self.layer_dims[split:]

    @property
    def index_dims(self) -> str:
        """The letters before these: the file has a tensor for each index."""
        return self.dims.removesuffix(self.tensor_dims)

    def tensor_names(self, config: TransformerConfig) -> Iterator[tuple[tuple[int, ...], str]]:
        """The tensors of the file, each with its index into the leading dimensions of our array."""
        for index in np.ndindex(*_sizes(self.index_dims, config)):
            if self.has(index):
                yield index, self.tensor_name(index)

    def has(self, index: Sequence[int]) -> bool:
        """Whether the file has a tensor for this index into the leading dimensions."""
        return self.layers is None or index[0] in self.layers

    def tensor_name(self, index: Sequence[int]) -> str:
        of_dim = dict(zip(self.index_dims, index, strict=True))
        head = of_dim.get("H", of_dim.get("K"))
        return self.hf_name.format(layer=of_dim.get("N"), expert=of_dim.get("E"), head=head)

    @property
    def matrix_dims(self) -> tuple[str, str]:
        """Input and output letters of a matrix: HX, KX and F go out of D or come back to it."""
        dims = self.layer_dims[self.has_experts :]
        return (dims[:1], dims[1:]) if dims.startswith("D") else (dims[:-1], dims[-1:])

    @property
    def has_experts(self) -> bool:
        """Whether there is one such parameter for each expert (a router's E is an output)."""
        return self.layer_dims.startswith("E") and len(self.layer_dims) > 1

    @property
    def experts_in_tensor(self) -> bool:
        """Whether one tensor of the file contains all experts, as its first dimension."""
        return self.has_experts and "{expert}" not in self.hf_name

    @property
    def _file_axes(self) -> list[str]:
        """The letters of each dimension of a tensor of the file; the last output one is joined."""
        experts = ["E"] if self.experts_in_tensor else []
        if self.layout == "linear":
            return [*experts, *reversed(self.matrix_dims)]
        if self.layout == "conv1d":
            return [*experts, *self.matrix_dims]
        rest = self.tensor_dims[self.experts_in_tensor :]
        return [*experts, *([rest] if "X" in rest else rest)]

    @property
    def file_order(self) -> list[int]:
        """Our dimensions of one tensor, in the order in which the file has them."""
        return [self.tensor_dims.index(dim) for dim in "".join(self._file_axes)]

    @property
    def n_output_dims(self) -> int:
        """How many dimensions of a ``"linear"`` tensor, in the file's order, come before those of
        its inputs."""
        return len("".join(self._file_axes[:-1]))

    @property
    def output_axis(self) -> int:
        """The dimension of a tensor of the file along which parts are joined."""
        return -2 if self.layout == "linear" else -1

    def hf_shape(self, config: TransformerConfig, index: Sequence[int] = ()) -> tuple[int, ...]:
        """Shape of one tensor of the file: of the one at this index, where layers differ."""
        sizes = self._tensor_sizes(config, index)
        shape = [math.prod(sizes[dim] for dim in dims) for dims in self._file_axes]
        if self.piece:
            groups, width, _ = self.piece.place(config.dim_sizes)
            shape[self.output_axis] = groups * width
        return tuple(shape)

    def _tensor_sizes(self, config: TransformerConfig, index: Sequence[int]) -> dict[str, int]:
        return config.dim_sizes_of(index[0]) if self.stacked and index else config.dim_sizes

    def view(
        self, tensor: np.ndarray, config: TransformerConfig, index: Sequence[int] = ()
    ) -> np.ndarray:
        """This parameter within the tensor of the file at an index, in our order of dimensions.

        A view, not a copy, except for queries that are joined by key-value head, and for a layer
        that does not have all that the largest has. A tensor with some of the experts gives a view
        of these.
        """
        sizes = self._tensor_sizes(config, index)
        if self.experts_in_tensor:
            sizes["E"] = len(tensor)
        in_file = "".join(self._file_axes)
        tensor = self._part(tensor, config).reshape([sizes[dim] for dim in in_file])
        value = tensor.transpose([in_file.index(dim) for dim in self.tensor_dims])
        if config.layer_shapes and self.stacked and index:
            value = layer_shapes.spread(value, self.tensor_dims, index[0], config)
        return value

    def write(
        self,
        tensor: np.ndarray,
        value: np.ndarray,
        config: TransformerConfig,
        index: Sequence[int] = (),
    ) -> None:
        """Sets this parameter within the tensor of the file at an index to ``value``, in our
        order."""
        if config.layer_shapes and self.stacked and index:
            value = layer_shapes.gathered(value, self.tensor_dims, index[0], config)
        part = self._part(tensor, config)
        part[...] = value.transpose(self.file_order).reshape(part.shape)

    def _part(self, tensor: np.ndarray, config: TransformerConfig) -> np.ndarray:
        """What this parameter is of a joined tensor, its output dimension as [groups, width]."""
        if not self.piece:
            return tensor
        groups, width, part = self.piece.place(config.dim_sizes)
        shape, axis = list(tensor.shape), tensor.ndim + self.output_axis
        shape[axis : axis + 1] = groups, width
        return tensor.reshape(shape)[(slice(None),) * (axis + 1) + (part,)]

    @property
    def scale_dims(self) -> str:
        """The letters of the int8 scale, "1" for a dimension that shares one; empty for a parameter
        that is not quantised (norms, biases, routers, positions)."""
        if self.dims in ("VD", "VM"):
            return "V1"
        inputs, outputs = self.matrix_dims
        if self.layout == "same" or "E" in outputs:
            return ""
        return "".join("1" if dim in inputs else dim for dim in self.dims)

    def is_int8(self, config: TransformerConfig) -> bool:
        return config.quantise == "int8" and bool(self.scale_dims)

    def initial(self, key: jax.Array, config: TransformerConfig, shape: tuple[int, ...]) -> Any:
        dtype = array_dtype(config)
        if self.init in ("zeros", "ones"):
            return jnp.full(shape, float(self.init == "ones"), dtype)
        std = config.initializer_range
        if self.init == "residual":
            std /= math.sqrt(2 * config.n_layers)
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _sizes(dims: str, config: TransformerConfig) -> tuple[int, ...]:
    sizes = config.dim_sizes
    return tuple(sizes[dim] for dim in dims)


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

    def initial(row: ParamRow, key: jax.Array) -> Any:
        value, mask = row.initial(key, config, row.shape(config)), row.used_mask(config)
        return value if mask is None else jnp.where(mask, value, 0)

    return build_tree(
        (row.path, initial(row, row_key)) for row, row_key in zip(table, keys, strict=True)
    )


def abstract_params(table: list[ParamRow], config: TransformerConfig) -> Params:
    """Shapes and dtypes of a loaded model, without memory."""
    return build_tree((row.path, _abstract(row, config)) for row in table)


def _abstract(row: ParamRow, config: TransformerConfig) -> jax.ShapeDtypeStruct | Int8Matrix:
    shape, dtype = row.shape(config), array_dtype(config)
    if not row.is_int8(config):
        return jax.ShapeDtypeStruct(shape, dtype)
    scale = tuple(
        1 if dim == "1" else size for dim, size in zip(row.scale_dims, shape, strict=True)
    )
    values = jax.ShapeDtypeStruct(shape, jnp.int8)
    return Int8Matrix(values, jax.ShapeDtypeStruct(scale, jnp.float32), dtype)


def count_params(table: list[ParamRow], config: TransformerConfig) -> int:
    return sum(row.count(config) for row in table)


def count_zeros(table: list[ParamRow], config: TransformerConfig) -> int:
    """How many numbers of our arrays only fill the places of smaller layers."""
    return sum(math.prod(row.shape(config)) for row in table) - count_params(table, config)
