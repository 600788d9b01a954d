"""Names of hook points in the residual stream.

A hook point is a *boundary* k: the residual stream after the first k blocks. Boundary 0 is the
input of the first block, boundary N the output of the last one, before the final norm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

HookPoint = int | str
"""A 0-based block (its output), or a name: see :func:`boundaries`."""

_KNOWN = (
    r"blocks\.(\d+)\.hook_resid_post",
    r"blocks\.(\d+)\.hook_resid_pre",
    r"hidden_states\[(\d+)\]",
)


def is_hook_point(value: object) -> bool:
    """Whether it is one hook point, not several of them."""
    return isinstance(value, int | str | np.integer)


def boundaries(points: Sequence[HookPoint], n_layers: int, model: str) -> tuple[int, ...]:
    """The boundary of each hook point.

    Args:
      points: blocks by number (the output of block k is boundary k + 1), or names:
        ``blocks.k.hook_resid_post`` is the output of block k, ``blocks.k.hook_resid_pre`` its
        input (TransformerLens), ``hidden_states[k]`` is boundary k (transformers).
      n_layers: the number of blocks of the model.
      model: its name in messages.

    Raises:
      ValueError: unknown hook points, all of them listed.
    """
    found = [_boundary(point, n_layers) for point in points]
    layers = [str(point) for point, k in zip(points, found, strict=True) if k is None]
    if layers:
        raise ValueError(
            f"layer {', '.join(layers)} is out of range: {model} has layers 0 to {n_layers - 1} "
            "(model.layer). Known hook points are a layer's number (its output), "
            "'blocks.<layer>.hook_resid_post' (the same), 'blocks.<layer>.hook_resid_pre' and "
            f"'hidden_states[<0 to {n_layers - 1}>]' (transformers' last one is after the final "
            "norm and is not the residual stream)"
        )
    return tuple(found)


def _boundary(point: HookPoint, n_layers: int) -> int | None:
    if isinstance(point, str):
        matches = [re.fullmatch(pattern, point) for pattern in _KNOWN]
        number = next((int(match[1]) for match in matches if match), None)
        if number is None or number >= n_layers:
            return None
        return number + 1 if matches[0] else number
    return int(point) + 1 if 0 <= point < n_layers else None
