"""Puts rows of a cache on the devices as the batch of a step."""

from __future__ import annotations

import numpy as np
from jax.sharding import Sharding

from conlens_jax.data.rows import Rows, RowSource
from conlens_jax.lens.batch import Batch
from conlens_jax.parallel.processes import local_rows, on_devices


def make_batch(
    rows: Rows,
    sharding: Sharding,
    batch_size: int,
    first_example: int = 0,
    rows_per_document: int = 1,
) -> Batch:
    """Rows on the devices, padded to ``batch_size`` by repeating the last one.

    Raises:
      ValueError: a group of ``rows_per_document`` rows is not from one document.
    """
    here = np.minimum(local_rows(sharding, batch_size), len(rows) - 1)
    return _on_devices(
        rows.take(here), first_example + here, sharding, batch_size, rows_per_document
    )


def read_batch(
    source: RowSource, indices_B: np.ndarray, sharding: Sharding, rows_per_document: int = 1
) -> Batch:
    """Like :func:`make_batch`; each process reads only the rows for its own devices."""
    here = local_rows(sharding, len(indices_B))
    rows = source.rows(indices_B[here])
    return _on_devices(rows, here, sharding, len(indices_B), rows_per_document)


def _on_devices(
    rows: Rows, examples: np.ndarray, sharding: Sharding, batch_size: int, rows_per_document: int
) -> Batch:
    """A batch from this process's part of it; ``examples`` are indices into the whole batch."""
    if np.any(
        rows.documents_N != np.repeat(rows.documents_N[::rows_per_document], rows_per_document)
    ):
        raise ValueError(f"each group of {rows_per_document} rows must be from one document")
    put = lambda array: on_devices(array, sharding, batch_size)
    put_per_document = lambda array: on_devices(
        array[::rows_per_document], sharding, batch_size // rows_per_document
    )
    return Batch(
        put(np.asarray(rows.activations_ND, np.float32)),
        put_per_document(rows.tokens_NS),
        put_per_document(rows.lengths_N),
        put(rows.positions_N),
        put(examples.astype(np.int32)),
        put(rows.targets_NT) if rows.targets_NT.shape[1] else None,
    )
