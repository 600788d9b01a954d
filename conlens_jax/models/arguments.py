"""Positions and vectors from a caller, checked and converted to NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


def index_array(values: Any, name: str) -> np.ndarray:
    """Whole numbers, or a boolean mask, from any ordered collection of them.

    Args:
      name: what the caller's argument is called.

    Raises:
      ValueError: anything else: None, floats (also 3.0), sets, truth values among numbers.
    """
    if values is None:
        raise ValueError(f"{name} must be given: an index, or several; not None")
    if isinstance(values, Set | Mapping):
        raise ValueError(f"{name} must have an order: give a list, such as sorted({name})")
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal length
        array = np.asarray(None)
    if array.size == 0 and not isinstance(values, np.ndarray):
        return array.astype(np.int64)  # NumPy makes [] an array of floats
    if array.dtype.kind == "O":
        is_whole = all(isinstance(entry, int) for entry in array.flat)  # more than 64 bits
    else:
        is_whole = array.dtype.kind in "iu" or (array.dtype.kind == "b" and array.ndim > 0)
    if array.dtype.kind != "b" and isinstance(values, list | tuple):
        is_whole = is_whole and not any(isinstance(entry, bool | np.bool_) for entry in values)
    if not is_whole:
        raise ValueError(
            f"{name} must be whole numbers (or a boolean mask, one entry per token), "
            f"not {values!r:.80}"
        )
    return array


def row_positions(positions: Any, mask_BS: Bool[np.ndarray, "B S"]) -> Int[np.ndarray, "B"]:
    """The index of one token per row.

    Args:
      positions: one index for all rows, or one per row: counted from the start of the row with
        padding, or if negative from its last real token without padding. Or a boolean mask [S] or
        [B, S] that marks one token per row.
      mask_BS: False on padding.

    Raises:
      ValueError: out of range, on padding, or of another type; every such row is named.
    """
    batch, length = mask_BS.shape
    values = index_array(positions, "positions")
    if values.dtype == bool:
        return _marked(values, mask_BS)
    if values.shape not in ((), (1,), (batch,), (batch, 1)):
        raise ValueError(
            f"positions has shape {values.shape}; it must be one index or one for each of the "
            f"{batch} rows"
        )
    values_B = np.broadcast_to(values.reshape(-1), (batch,))
    wrong = [int(value) for value in values_B if not -length <= value < length]
    if wrong:
        raise ValueError(
            f"positions must be below the sequence length {length} (from the end: at least "
            f"-{length}), not {', '.join(map(str, dict.fromkeys(wrong)))}"
        )
    found_B, problems = np.zeros(batch, np.int64), []
    for row, value in enumerate(map(int, values_B)):
        real = np.flatnonzero(mask_BS[row])
        if value < -len(real):
            problems.append(f"row {row} has {len(real)} real tokens, and no token {value}")
        else:
            found_B[row] = real[value] if value < 0 else value
    return _on_tokens(found_B, mask_BS, problems)


def _marked(marks: np.ndarray, mask_BS: np.ndarray) -> np.ndarray:
    if marks.shape not in (mask_BS.shape, mask_BS.shape[1:]):
        raise ValueError(
            f"positions is a boolean mask of shape {marks.shape}; it must be {mask_BS.shape}, one "
            "entry per token"
        )
    marks_BS = np.broadcast_to(marks, mask_BS.shape)
    problems = [
        f"the mask marks {count} tokens of row {row}; it must mark one"
        for row, count in enumerate(marks_BS.sum(axis=1))
        if count != 1
    ]
    return _on_tokens(np.argmax(marks_BS, axis=1), mask_BS, problems)


def _on_tokens(found_B: np.ndarray, mask_BS: np.ndarray, problems: list[str]) -> np.ndarray:
    if not problems:
        problems = [
            f"position {place} of row {row} is padding (mask is False there)"
            for row, place in enumerate(found_B)
            if not mask_BS[row, place]
        ]
    if problems:
        raise ValueError(f"positions: {'; '.join(problems)}")
    return found_B.astype(np.int32)


def finite_array(
    values: Any, name: str, positions_B: np.ndarray | None = None
) -> Float[np.ndarray, "..."]:
    """Numbers as float32, all of them finite.

    Args:
      name: what the caller's argument is called.
      positions_B: the index in the sequence of each row's vector, for the message.

    Raises:
      ValueError: not numbers, or NaN or infinity among them (infinite as float32 too); the rows
        are named.
    """
    try:
        with np.errstate(over="ignore"):
            if np.iscomplexobj(values):
                raise TypeError("complex numbers")
            array = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers ({error})") from None
    bad = ~np.isfinite(array)
    if not bad.any():
        return array
    if array.ndim < 2:
        where = f" ({int(bad.sum())} of {array.size} numbers)"
    else:
        rows = np.flatnonzero(bad.reshape(len(array), -1).any(axis=1))[:10]
        at = lambda row: "" if positions_B is None else f" (position {positions_B[row]})"
        where = " in row " + ", ".join(f"{row}{at(row)}" for row in rows)
    raise ValueError(f"{name} contains NaN or infinity{where}; every number must be finite")
