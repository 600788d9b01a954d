"""Activations are laid out by the names of their dimensions, as parameters are.

Left to itself the compiler follows the parameters, and where these are split over ``fsdp`` it may
keep whole batches on every device. Under a mesh (``jax.set_mesh``) :func:`constrain` says how an
activation lies; without one there is nothing to say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from conlens_jax.parallel.mesh import BATCH_AXES

AXES_OF_NAME: dict[str, tuple[str, ...]] = {
    "B": BATCH_AXES,
    "V": ("tensor",),
    "H": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
}
"""Dimensions that are split; the others (length, width) are whole on every device."""


def constrain(x: Array, names: str) -> Array:
    """``x`` lying as its dimensions' letters say, one each; the same values.

    A dimension that its mesh axes do not divide (one row of text, for exploration) stays whole.
    """
    return _lying(x, [AXES_OF_NAME.get(name) for name in names])


def looked_up(rows: Array) -> Array:
    """Rows of a table that is split along its width over ``fsdp``, [B, …, D], one batch row each.

    A device has its part of the width of every row, and needs whole rows of its part of the batch:
    first the one and then the other is said, so that they are exchanged within ``fsdp``. Told only
    the second, the compiler makes the whole batch on every device. The gradient goes back the same
    way.
    """
    if rows.ndim < 2:
        return rows
    between = [None] * (rows.ndim - 2)
    rows = _lying(rows, [("data",), *between, ("fsdp",)])
    return _lying(rows, [BATCH_AXES, *between, None])


def looked_up_bar(rows_bar: Array) -> Array:
    """The cotangent's way through :func:`looked_up`."""
    if rows_bar.ndim < 2:
        return rows_bar
    between = [None] * (rows_bar.ndim - 2)
    rows_bar = _lying(rows_bar, [BATCH_AXES, *between, None])
    return _lying(rows_bar, [("data",), *between, ("fsdp",)])


def _lying(x: Array, axes_of_dim: Sequence[tuple[str, ...] | None]) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    divides = lambda axes, size: size % math.prod(mesh.shape[axis] for axis in axes) == 0
    spec = P(
        *(
            axes if axes and divides(axes, size) else None
            for axes, size in zip(axes_of_dim, x.shape, strict=True)
        )
    )
    return jax.lax.with_sharding_constraint(x, spec)
