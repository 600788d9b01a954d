"""Rows: activations with the contexts that they were read from, as NumPy arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

# Never float16: the residual stream of large models exceeds its range (65504).
ACTIVATION_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Rows:
    """N activations with the contexts that they were read from.

    Attributes:
      activations_ND: the raw residual stream at position P, float32 or bfloat16.
      tokens_NS: int32, the context, right-padded, including the true tokens after P.
      positions_N: int32, P, 0-based.
      lengths_N: int32, number of tokens that are not padding.
      documents_N: int64, document of each row (rows of one document are not independent).
      targets_NT: int32, the text that the warm start teaches for each row, filled up with the end
        token; of width 0 (None is made one) where that is a window of the context.

    Raises:
      ValueError: shapes or dtypes are wrong (all are listed).
    """

    activations_ND: np.ndarray
    tokens_NS: np.ndarray
    positions_N: np.ndarray
    lengths_N: np.ndarray
    documents_N: np.ndarray
    targets_NT: np.ndarray | None = None

    def __post_init__(self):
        if self.targets_NT is None:
            nothing = np.zeros((len(self.positions_N), 0), np.int32)
            object.__setattr__(self, "targets_NT", nothing)
        dtypes = {
            "activations_ND": tuple(ACTIVATION_DTYPES.values()),
            "tokens_NS": (np.dtype(np.int32),),
            "positions_N": (np.dtype(np.int32),),
            "lengths_N": (np.dtype(np.int32),),
            "documents_N": (np.dtype(np.int64),),
            "targets_NT": (np.dtype(np.int32),),
        }
        problems = []
        n_rows = len(self.positions_N)
        for name, allowed in dtypes.items():
            array = getattr(self, name)
            n_axes = len(name.rsplit("_", 1)[1])
            if array.ndim != n_axes or len(array) != n_rows:
                problems.append(f"Rows.{name} has shape {array.shape}, with {n_rows} positions")
            if array.dtype not in allowed:
                names = " or ".join(dtype.name for dtype in allowed)
                problems.append(f"Rows.{name} must be {names}, not {array.dtype}")
        if problems:
            raise ValueError("; ".join(problems))

    def __len__(self) -> int:
        return len(self.positions_N)

    def take(self, indices: np.ndarray | Sequence[int] | slice) -> Rows:
        """The rows at ``indices`` (an index array, a slice or a mask), in that order."""
        return Rows(*(getattr(self, field.name)[indices] for field in dataclasses.fields(self)))

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, in order."""
        return Rows(
            *(
                np.concatenate([getattr(part, field.name) for part in parts])
                for field in dataclasses.fields(Rows)
            )
        )


@dataclasses.dataclass(frozen=True)
class Places:
    """Positions, lengths and documents of N rows, as in :class:`Rows`: 16 bytes per row."""

    positions_N: np.ndarray
    lengths_N: np.ndarray
    documents_N: np.ndarray

    @staticmethod
    def of(rows: Rows) -> Places:
        return Places(rows.positions_N, rows.lengths_N, rows.documents_N)


class RowSource(Protocol):
    """A source of rows: a cache on disk, a corpus, or memory.

    ``places`` yields positions, lengths and documents of all rows, in order.
    """

    def __len__(self) -> int: ...
    def rows(self, indices: np.ndarray | Sequence[int]) -> Rows: ...
    def places(self) -> Iterator[Places]: ...


def checked_indices(indices: np.ndarray | Sequence[int], n_rows: int) -> np.ndarray:
    """``indices`` as a one-dimensional int64 array; ValueError unless all in ``0 … n_rows − 1``."""
    array = np.asarray(indices)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"row indices must be a list of whole numbers, not {array.dtype}")
    if array.size and (array.min() < 0 or array.max() >= n_rows):
        raise ValueError(f"row indices must be 0 … {n_rows - 1}, not {array.min()} … {array.max()}")
    return array.astype(np.int64)
