"""The next token from logits: the most probable, or a sample at a temperature from a nucleus."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def nucleus(logits: Float[Array, "*B V"], top_p: Float[Array, ""]) -> Float[Array, "*B V"]:
    """The logits with −∞ outside the smallest set of most probable tokens whose probabilities
    reach ``top_p`` (Holtzman et al. 2020, arXiv:1904.09751).

    Tokens as probable as the least probable one in the set are in it too.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    above = jnp.cumsum(probability, axis=-1) - probability
    last = jnp.sum(above < top_p, axis=-1, keepdims=True) - 1
    lowest = jnp.take_along_axis(ordered, jnp.maximum(last, 0), axis=-1)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def choose_token(
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, "B"] | None,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""] | None,
) -> Int[Array, "B"]:
    """The most probable tokens if ``keys_B`` is None, else a sample per row with its own key.

    Args:
      logits_BV: fp32.
      temperature: logits are divided by it; above 0, unused without keys.
      top_p: of :func:`nucleus`, after the temperature; None keeps all tokens.
    """
    if keys_B is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_p is not None:
        logits_BV = nucleus(logits_BV, top_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
