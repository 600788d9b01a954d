"""What is trained, what is frozen, and how many bytes each part takes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax

from conlens_jax.models.param_table import Params

MIB = 2.0**20


def parameter_table(trainable: Params, frozen: Params) -> tuple[list[str], list[list[str]]]:
    """Header and rows: part, trained or frozen, parameters, MiB."""
    rows = [
        [f"{side} {name}", "trained", *_size(part)]
        for side in ("decoder", "encoder")
        for name, part in sorted(trainable[side].items())
    ]
    rows += [[name, "frozen", *_size(part)] for name, part in _frozen_parts(frozen)]
    rows.append(["total trained", "", *_size(trainable)])
    return ["part", "", "parameters", "MiB"], rows


def _frozen_parts(frozen: Params) -> Iterator[tuple[str, Params]]:
    yield "original model", frozen["original"]
    for side in ("decoder", "encoder"):
        for name, part in sorted(frozen[side].items()):
            yield f"{side} {name}", part


def _size(tree: Params) -> tuple[str, str]:
    leaves = jax.tree.leaves(tree)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    size = sum(leaf.nbytes for leaf in leaves)
    return f"{count:,}", f"{size / MIB:,.1f}"
