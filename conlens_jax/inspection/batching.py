"""Explaining many positions of many documents with a handful of compiled shapes.

Documents are padded to a power of two and read together up to :data:`TOKENS_AT_ONCE` tokens; their
rows then go through the lens ``batch_size`` at a time. The last, smaller batch is filled up to a
power of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from conlens_jax.lens.batch import filled
from conlens_jax.models.generate import bucket
from conlens_jax.parallel.mesh import batch_sharding, replicated

TOKENS_AT_ONCE = 4096


class Row(NamedTuple):
    """A text to write: document, position, and sample number."""

    document: int
    position: int
    sample: int


class Group(NamedTuple):
    """Documents that are read together, and their rows.

    Attributes:
      tokens_GS, mask_GS: the documents, padded on the right; copies fill the group up.
      rows: all rows of these documents.
      index_of: the index of each document in the group.
    """

    tokens_GS: np.ndarray
    mask_GS: np.ndarray
    rows: list[Row]
    index_of: dict[int, int]


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


def groups_of(
    documents: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    samples: int,
    least_length: int = 1,
) -> Iterator[Group]:
    """Groups of documents of similar length, padded to at least ``least_length``; each document is
    in one group."""
    by_length: dict[int, list[int]] = {}
    for number, tokens in enumerate(documents):
        by_length.setdefault(bucket(max(len(tokens), least_length)), []).append(number)
    for length, numbers in sorted(by_length.items()):
        most = max(TOKENS_AT_ONCE // length, 1)
        for start in range(0, len(numbers), most):
            members = numbers[start : start + most]
            tokens_GS = np.zeros((len(members), length), np.int32)
            lengths_G = np.array([len(documents[number]) for number in members])
            for index, number in enumerate(members):
                tokens_GS[index, : len(documents[number])] = documents[number]
            mask_GS = np.arange(length) < lengths_G[:, None]
            size = power_of_two(len(members))
            yield Group(
                filled(tokens_GS, size),
                filled(mask_GS, size),
                [Row(d, p, s) for d in members for p in positions[d] for s in range(samples)],
                {number: index for index, number in enumerate(members)},
            )


def batches_of(
    group: Group, batch_size: int, mesh: Mesh, whole: bool = False
) -> Iterator[tuple[list[Row], list]]:
    """Batches of rows, each with (index in the group, position, sample) on the mesh, filled up.

    Args:
      whole: the last batch too is filled up to ``batch_size``.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    sharding = batch_sharding(mesh)
    for start in range(0, len(group.rows), batch_size):
        rows = group.rows[start : start + batch_size]
        size = batch_size if whole else min(batch_size, power_of_two(len(rows)))
        size = -(-size // parts) * parts
        indices = [(group.index_of[r.document], r.position, r.sample) for r in rows]
        columns = zip(*indices, strict=True)
        arrays = [filled(np.array(column, np.int32), size) for column in columns]
        yield rows, [jax.device_put(array, sharding) for array in arrays]


def aligned_right(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] and mask of lists of tokens, with padding on the left, for a model that is read
    at its last token; B and T are those of a compiled shape, B filled up with copies."""
    length = bucket(max(map(len, lists)))
    tokens_BT = np.zeros((len(lists), length), np.int32)
    mask_BT = np.zeros(tokens_BT.shape, bool)
    for row, tokens in enumerate(lists):
        tokens_BT[row, length - len(tokens) :] = tokens
        mask_BT[row, length - len(tokens) :] = True
    size = power_of_two(len(lists))
    return filled(tokens_BT, size), filled(mask_BT, size)


def on_every_device(array: np.ndarray, mesh: Mesh) -> jax.Array:
    return jax.device_put(array, replicated(mesh))
