"""Rows of a cache on the device."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.data.rows import Rows, RowSource
from conlens_jax.lens.original import capture, documents_of
from conlens_jax.lens.spec import LensSpec
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.processes import local_rows, on_devices


@flax.struct.dataclass
class Batch:
    """Rows of the cache on the device.

    Where rows share a document its context is there once: ``tokens_GS`` and ``lengths_G`` have a
    row a document, and B / G rows, one behind the other, belong to each. ``examples_B`` numbers
    the rows within the global batch.
    """

    activation_BD: Float[Array, "B D"]
    tokens_GS: Int[Array, "G S"]
    lengths_G: Int[Array, "G"]
    positions_B: Int[Array, "B"]
    examples_B: Int[Array, "B"]

    @property
    def mask_GS(self) -> Bool[Array, "G S"]:
        return jnp.arange(self.tokens_GS.shape[1]) < self.lengths_G[:, None]

    @property
    def rows_per_document(self) -> int:
        return len(self.positions_B) // len(self.lengths_G)


def with_activations(batch: Batch, original: Params, spec: LensSpec) -> Batch:
    """The batch with its activations captured from M where it came without (``data.source=stream``:
    they have the width 0)."""
    if batch.activation_BD.shape[1]:
        return batch
    states_GSD = capture(original, batch.tokens_GS, batch.mask_GS, spec=spec)
    documents_B = documents_of(batch.positions_B, batch.tokens_GS)
    activation_BD = states_GSD[documents_B, batch.positions_B].astype(jnp.float32)
    return batch.replace(activation_BD=activation_BD)


def make_batch(
    rows: Rows,
    sharding: Sharding,
    batch_size: int,
    first_example: int = 0,
    rows_per_document: int = 1,
) -> Batch:
    """Rows on the device, filled up to ``batch_size`` by repeating the last one.

    Raises:
      ValueError: ``rows_per_document`` neighbours are not of one document.
    """
    here = np.minimum(local_rows(sharding, batch_size), len(rows) - 1)
    return _on_devices(
        rows.take(here), first_example + here, sharding, batch_size, rows_per_document
    )


def read_batch(
    source: RowSource, indices_B: np.ndarray, sharding: Sharding, rows_per_document: int = 1
) -> Batch:
    """:func:`make_batch` of rows that each process reads for its own devices alone."""
    here = local_rows(sharding, len(indices_B))
    rows = source.rows(indices_B[here])
    return _on_devices(rows, here, sharding, len(indices_B), rows_per_document)


def _on_devices(
    rows: Rows, examples: np.ndarray, sharding: Sharding, batch_size: int, rows_per_document: int
) -> Batch:
    """A batch from this process's part of it, with the rows' numbers in the whole."""
    if np.any(
        rows.documents_N != np.repeat(rows.documents_N[::rows_per_document], rows_per_document)
    ):
        raise ValueError(f"every {rows_per_document} rows must be of one document")
    put = lambda array: on_devices(array, sharding, batch_size)
    a_document = lambda array: on_devices(
        array[::rows_per_document], sharding, batch_size // rows_per_document
    )
    return Batch(
        put(np.asarray(rows.activations_ND, np.float32)),
        a_document(rows.tokens_NS),
        a_document(rows.lengths_N),
        put(rows.positions_N),
        put(examples.astype(np.int32)),
    )


def filled(array: np.ndarray, size: int) -> np.ndarray:
    missing = size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array
