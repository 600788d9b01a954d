"""Weight-only int8 for frozen matrices, with one fp32 scale per output channel.

A matrix W [inputs, outputs] is kept as q, its nearest int8 in units of s = max|W| / 127 of each
output, and used as (x @ q)·s, so that the scale costs one multiplication per output instead of
one per weight (LLM.int8's vector-wise scheme, weights only, Dettmers et al. 2022,
arXiv:2208.07339). The embedding has one scale per row: a row is an output of the table that is
looked up and of the tied head.

An int8 matrix has no gradient. The backward pass computes x̄ = (ȳ·s) @ qᵀ from q and s: plain
autodiff would save every layer's matrix as floats until then.

Why not a library. qwix (0.1.8) has all of this and more: int4, nf4 and fp8, block-wise scales,
QLoRA, and interception of a Linen module's products; AQT adds quantised training. Measured:
``qwix.einsum`` of an array and a ``QArray`` in a scan over 8 layers under ``jax.grad`` saves the
floats of every layer: 1.26 times the fp32 weights in temporary memory, against 0.26 here (mostly
the one layer that is running). And a matrix here must be sliced by layer and sharded by its
dimension letters, be table and head at once, and take part in a hand-written backward pass
(:mod:`conlens_jax.models.products`). With a dependency this file would not be shorter.
"""

from __future__ import annotations

import functools
import itertools
import string
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from conlens_jax.parallel.constrain import looked_up, looked_up_bar, tokens_to_look_up

_MOST = 127


@flax.struct.dataclass
class Int8Matrix:
    """A frozen matrix equal to ``values * scale``, with the interface of an array.

    Attributes:
      values: int8.
      scale: fp32, with the same number of dimensions; size 1 where all share one scale.
      dtype: of the matrix that it represents.
    """

    values: Int[Array, "..."]
    scale: Float[Array, "..."]
    dtype: jnp.dtype = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def T(self) -> Int8Matrix:
        return self.replace(values=self.values.T, scale=self.scale.T)

    def astype(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The matrix as floats."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


Matrix = Array | Int8Matrix


@flax.struct.dataclass
class JoinedTable:
    """Tables of the same rows side by side, without a copy: [V, D] and [V, L] as [V, D + L]; or
    this transposed."""

    parts: tuple[Matrix, ...]
    transposed: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def T(self) -> JoinedTable:
        return JoinedTable(tuple(part.T for part in self.parts), not self.transposed)

    @property
    def dtype(self) -> jnp.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, int]:
        width = sum(part.shape[0 if self.transposed else 1] for part in self.parts)
        rows = self.parts[0].shape[1 if self.transposed else 0]
        return (width, rows) if self.transposed else (rows, width)


def quantise(matrix: Float[Array, "..."], inputs: tuple[int, ...]) -> Int8Matrix:
    """Rounds to the nearest int8; ``inputs`` are the dimensions that share a scale.

    An output of zeros stays zero.
    """
    wide = matrix.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True) / _MOST
    values = jnp.round(wide / jnp.where(scale == 0, 1.0, scale))
    return Int8Matrix(values.astype(jnp.int8), scale, jnp.dtype(matrix.dtype))


def einsum(equation: str, x: Float[Array, "..."], matrix: Matrix) -> Float[Array, "..."]:
    """``jnp.einsum`` of x and a matrix that may be int8.

    Differentiable in x, and in the matrix if it is an array.
    """
    if not isinstance(matrix, Int8Matrix):
        return jnp.einsum(equation, x, matrix)
    # Autodiff saves the inputs of the product, q and s, not the matrix as floats.
    product = jax.checkpoint(functools.partial(_int8_einsum, equation))
    return product(x, matrix.values, jax.lax.stop_gradient(matrix.scale))


def _int8_einsum(equation: str, x: Array, values: Array, scale: Array) -> Array:
    operands, output = equation.split("->")
    inputs, letters = operands.split(",")
    scaled = {dim for dim, size in zip(letters, scale.shape, strict=True) if size > 1}
    if not scaled <= set(output):
        # The scale is on a dimension that is summed over: a weighted sum of a table's rows.
        x = _times(x, _aligned(scale, letters, inputs))
        return jnp.einsum(equation, x, values.astype(x.dtype))
    out = jnp.einsum(equation, x, values.astype(x.dtype))
    return _times(out, _aligned(scale, letters, output))


def _times(x: Array, scale: Array) -> Array:
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def _aligned(scale: Array, letters: str, target: str) -> Array:
    """``scale`` with the dimensions of ``target``, size 1 for those it does not have."""
    size = dict(zip(letters, scale.shape, strict=True))
    order = sorted(letters, key=lambda dim: target.find(dim))
    scale = scale.transpose([letters.index(dim) for dim in order])
    return scale.reshape([size.get(dim, 1) for dim in target])


def matmul(x: Float[Array, "*B D"], matrix: Matrix | JoinedTable) -> Float[Array, "*B V"]:
    """``x @ matrix``, which may be int8; differentiable like :func:`einsum`."""
    if isinstance(matrix, JoinedTable):
        return _joined_matmul(x, matrix)
    if not isinstance(matrix, Int8Matrix):
        return jnp.matmul(x, matrix)
    batch = string.ascii_lowercase[: x.ndim - 1]
    return einsum(f"{batch}y,yz->{batch}z", x, matrix)


def _joined_matmul(x: Array, table: JoinedTable) -> Array:
    if not table.transposed:
        return jnp.concatenate([matmul(x, part) for part in table.parts], axis=-1)
    ends = list(itertools.accumulate(part.shape[0] for part in table.parts))
    pieces = jnp.split(x, ends[:-1], axis=-1)
    return sum(matmul(piece, part) for piece, part in zip(pieces, table.parts, strict=True))


def take_rows(table_VD: Matrix | JoinedTable, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Rows of a table that may be int8."""
    if isinstance(table_VD, JoinedTable):
        return jnp.concatenate([take_rows(part, tokens) for part in table_VD.parts], axis=-1)
    tokens = tokens_to_look_up(tokens)
    if not isinstance(table_VD, Int8Matrix):
        return looked_up(jnp.take(table_VD, tokens, axis=0))
    rows, scale = (jnp.take(leaf, tokens, axis=0) for leaf in (table_VD.values, table_VD.scale))
    scaled = rows.astype(jnp.float32) * jax.lax.stop_gradient(scale)
    return looked_up(scaled.astype(table_VD.dtype))


def take_rows_bar(
    table_VD: Matrix | JoinedTable, tokens: Int[Array, "*B"], rows_bar: Float[Array, "*B D"]
) -> Matrix | JoinedTable:
    """The table's cotangent from that of its rows."""
    if isinstance(table_VD, JoinedTable):
        ends = list(itertools.accumulate(part.shape[1] for part in table_VD.parts))
        pieces = zip(table_VD.parts, jnp.split(rows_bar, ends[:-1], axis=-1), strict=True)
        return JoinedTable(tuple(take_rows_bar(part, tokens, bar) for part, bar in pieces))
    zeros = zeros_bar(table_VD)
    if isinstance(table_VD, Int8Matrix):
        return zeros
    return zeros.at[tokens_to_look_up(tokens)].add(looked_up_bar(rows_bar))


def zeros_bar(tree: Any) -> Any:
    """Zero cotangents for a tree of weights; of integers, JAX's ``float0``."""

    def of_leaf(leaf: Array) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros_like(leaf)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(of_leaf, tree)


def split_frozen(weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights that have a gradient, and those that are int8."""
    is_frozen = lambda name: isinstance(weights[name], Int8Matrix)
    frozen = {name: weights[name] for name in weights if is_frozen(name)}
    return {name: weights[name] for name in weights if not is_frozen(name)}, frozen
