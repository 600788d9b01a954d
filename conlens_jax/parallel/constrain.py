"""Sharding constraints on activations, by the letters of their dimensions.

Without them the compiler follows the parameters, and where these are split over ``fsdp`` it may
keep whole batches on every device. Outside a mesh (``jax.set_mesh``) the functions return their
argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from conlens_jax.parallel.mesh import BATCH_AXES, Axes, activation_axes


def constrain(x: Array, dims: str) -> Array:
    """``x`` sharded by the letters of its dimensions, one each; the same values.

    A dimension that its mesh axes do not divide (one row of text, for exploration) stays whole.
    """
    return _constrain(x, activation_axes(dims))


def tokens_to_look_up(tokens: Array) -> Array:
    """Tokens [B, …] with the part of the batch that the rows of :func:`looked_up` have at first.

    The table's gradient adds rows at the tokens: split otherwise, the rows would be moved to them.
    """
    if tokens.ndim < 1:
        return tokens
    return _constrain(tokens, ["data", *[None] * (tokens.ndim - 1)])


def looked_up(rows: Array) -> Array:
    """Rows [B, …, D] looked up in a table whose width is split over ``fsdp``.

    A device has its part of the width of every row, and needs whole rows of its part of the batch.
    With a constraint for each of the two, they are exchanged within ``fsdp``; with only the second,
    the compiler computes the whole batch on every device. The gradient takes the same way back.
    """
    if rows.ndim < 2:
        return rows
    between = [None] * (rows.ndim - 2)
    rows = _constrain(rows, ["data", *between, "fsdp"])
    return _constrain(rows, [BATCH_AXES, *between, None])


def looked_up_bar(rows_bar: Array) -> Array:
    """The cotangent of :func:`looked_up`'s argument from that of its result."""
    if rows_bar.ndim < 2:
        return rows_bar
    between = [None] * (rows_bar.ndim - 2)
    rows_bar = _constrain(rows_bar, [BATCH_AXES, *between, None])
    return _constrain(rows_bar, ["data", *between, "fsdp"])


def _constrain(x: Array, axes_of_dim: Sequence[Axes | None]) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    def if_divided(axes: Axes | None, size: int) -> Axes | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None

    return jax.lax.with_sharding_constraint(x, P(*map(if_divided, axes_of_dim, x.shape)))
