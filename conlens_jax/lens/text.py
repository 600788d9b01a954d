"""Explanations that end: which tokens of a text are real, and means over them.

All texts of a batch have T places. One that ends earlier is filled up with the end token, and
counts only up to the first of them: that token is real (D chose it, and E reads it), so a text has
1 to T real tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
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


def text_lengths(
    log_goes_on_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """The number of real tokens of each text, with a gradient to D's choice, at each of them, to
    end there.

    The gradient is that of the score function (REINFORCE) for this choice alone, and unbiased in
    it: at a token after which m more were written, not to end costs m.

    Args:
      log_goes_on_BT: log(1 − p(end)) in D's predictions of each token.
      mask_BT: :func:`real_tokens` of the texts.
    """
    length_B = jnp.sum(mask_BT, axis=1, dtype=jnp.float32)
    place_T = jnp.arange(1, mask_BT.shape[1] + 1, dtype=jnp.float32)
    after_BT = length_B[:, None] - place_T[None]
    # From the end on there is nothing to save, and the values may be infinite.
    value_BT = jnp.where(after_BT > 0, log_goes_on_BT, 0.0)
    return length_B + jnp.sum(after_BT * (value_BT - jax.lax.stop_gradient(value_BT)), axis=1)


def take_places(
    values_BT: Float[Array, "B T *D"], place_B: Int[Array, "B"]
) -> Float[Array, "B *D"]:
    """One entry of each row."""
    index = place_B.reshape(-1, *[1] * (values_BT.ndim - 1))
    return jnp.take_along_axis(values_BT, index, axis=1)[:, 0]


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
