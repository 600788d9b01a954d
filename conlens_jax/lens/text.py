"""Explanations that end: which tokens of a text are real, and means over them.

All texts of a batch have T places. One that ends earlier is filled up with the end token, and
counts only up to the first of them: that token is real (D chose it, and E reads it), so a text has
1 to T real tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def real_tokens(text_BT: Int[Array, "B T"], end: int | None) -> Bool[Array, "B T"] | None:
    """True up to the first end token, that one included; None if texts have no end."""
    if end is None:
        return None
    is_end_BT = (text_BT == end).astype(jnp.int32)
    return jnp.cumsum(is_end_BT, axis=1) - is_end_BT == 0


def last_real(mask_BT: Bool[Array, "B T"]) -> Int[Array, "B"]:
    """The place of each text's last real token."""
    return jnp.sum(mask_BT, axis=1, dtype=jnp.int32) - 1


def take_places(states_BTD: Float[Array, "B T D"], place_B: Int[Array, "B"]) -> Float[Array, "B D"]:
    """One state of each row."""
    return jnp.take_along_axis(states_BTD, place_B[:, None, None], axis=1)[:, 0]


def mean_of_texts(
    values_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"] | None
) -> Float[Array, ""]:
    """The mean over texts of the mean over the real tokens of each."""
    if mask_BT is None:
        return jnp.mean(values_BT)
    return jnp.mean(sum_of_text(values_BT, mask_BT) / jnp.sum(mask_BT, axis=1, dtype=jnp.float32))


def sum_of_text(
    values_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"] | None
) -> Float[Array, "B"]:
    """The sum over the real tokens of each text."""
    # Not a product: what is computed after the end may be infinite.
    return jnp.sum(values_BT if mask_BT is None else jnp.where(mask_BT, values_BT, 0.0), axis=1)


def lengths_of(texts_NT: np.ndarray, end: int | None) -> np.ndarray:
    """The number of real tokens of each text, on the host; [N] int32."""
    full_N = np.full(len(texts_NT), texts_NT.shape[1], np.int32)
    if end is None:
        return full_N
    is_end_NT = texts_NT == end
    return np.where(is_end_NT.any(axis=1), is_end_NT.argmax(axis=1) + 1, full_N).astype(np.int32)


def without_end(texts_NT: np.ndarray, end: int | None) -> list[np.ndarray]:
    """The tokens of each text before its end, on the host: what a person reads."""
    lengths_N = lengths_of(texts_NT, end)
    cut_N = [int(text[length - 1] == end) for text, length in zip(texts_NT, lengths_N, strict=True)]
    return [text[: n - cut] for text, n, cut in zip(texts_NT, lengths_N, cut_N, strict=True)]
