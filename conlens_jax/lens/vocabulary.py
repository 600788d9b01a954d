"""Functions with the vocabulary as a dimension: logits, losses over them, sampled tokens.

The logits of a batch of texts, [B, T, V] in fp32, are by far the largest array of a step. So
functions take the state after the last layer, [B, T, D], and compute logits from it a few tokens of
each text at a time, and again in the backward pass. If all of them fit into
:data:`LOGITS_AT_ONCE`, they are computed once and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from conlens_jax.config.estimator import Estimator
from conlens_jax.lens.gumbel import Noise, drawn_noise, straight_through_embed
from conlens_jax.lens.losses import cross_entropy, entropy, kl_divergence, log_not_token
from conlens_jax.models.transformer import Head

LOGITS_AT_ONCE = 1 << 24  # 64 MiB in fp32


def chunks_of(batch: int, text_len: int, vocab_size: int) -> int:
    """The number of equal parts that the tokens of a text are processed in."""
    divisors = (n for n in range(1, text_len + 1) if text_len % n == 0)
    fits = (n for n in divisors if batch * (text_len // n) * vocab_size <= LOGITS_AT_ONCE)
    return next(fits, text_len)


def noise_of_texts(
    keys_B: Key[Array, "B"],
    text_len: int,
    vocab_size: int,
    scale: Float[Array, ""] | float | None = None,
) -> Noise:
    """:func:`~conlens_jax.lens.gumbel.drawn_noise`, drawn once if it fits: a step uses it
    four times, and drawing costs as much as a product with the head."""
    noise = drawn_noise(keys_B, text_len, scale)
    if chunks_of(len(keys_B), text_len, vocab_size) > 1:
        return noise
    return Noise(noise.values(vocab_size))


def in_chunks(function: Callable[..., Any], arrays: Any, n_chunks: int) -> Any:
    """``function(arrays)`` for arrays [B, T, …] and results [B, T, …], T / n_chunks tokens at a
    time. With more than one chunk its intermediate values are recomputed in the backward pass.
    """
    if n_chunks == 1:
        return function(arrays)
    split = lambda leaf: jnp.moveaxis(
        leaf.reshape(leaf.shape[0], n_chunks, -1, *leaf.shape[2:]), 1, 0
    )
    join = lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(
        leaf.shape[1], n_chunks * leaf.shape[2], *leaf.shape[3:]
    )
    parts = jax.lax.map(jax.checkpoint(function), jax.tree.map(split, arrays))
    return jax.tree.map(join, parts)


def sampled_embeddings(
    head: Head,
    state_BTD: Float[Array, "B T D"],
    noise: Noise,
    tokens_BT: Int[Array, "B T"],
    table_VD: Float[Array, "V D"],
    tau: Float[Array, ""],
    *,
    estimator: Estimator,
    keys_BT: Key[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """:func:`~conlens_jax.lens.gumbel.straight_through_embed` of tokens that were sampled from
    ``head.logits(state_BTD)``; differentiable in head, state and table."""

    def embed(arrays):
        state, noise, tokens, keys = arrays
        values = noise.values(head.vocab_size)
        logits = head.logits(state)
        return straight_through_embed(
            logits, values, tokens, table_VD, tau, estimator=estimator, keys=keys
        )

    arrays = (state_BTD, noise, tokens_BT, keys_BT)
    return in_chunks(embed, arrays, chunks_of(*tokens_BT.shape, head.vocab_size))


class ReferenceLogits(NamedTuple):
    """Reference logits, as states and a head. A state of zeros has uniform logits."""

    head: Head
    state_BTD: Float[Array, "B T D"]

    def logits(self) -> Float[Array, "B T V"]:
        return self.head.logits(self.state_BTD)


def text_terms(
    head: Head,
    state_BTD: Float[Array, "B T D"],
    tokens_BT: Int[Array, "B T"],
    reference: ReferenceLogits | None = None,
    end: int | None = None,
) -> dict[str, Float[Array, "B T"]]:
    """Per token, in nats: ``entropy`` of the logits, ``nll`` of the token, with a reference ``lm``,
    the KL from it, and with an end token ``goes_on``, log(1 − p(end)). Unused terms cost nothing
    under ``jit``."""

    def terms(arrays):
        state, tokens, reference_state = arrays
        logits = head.logits(state)
        values = {"entropy": entropy(logits), "nll": cross_entropy(logits, tokens)}
        if reference is not None:
            values["lm"] = kl_divergence(reference.head.logits(reference_state), logits)
        if end is not None:
            values["goes_on"] = log_not_token(logits, end)
        return values

    arrays = (state_BTD, tokens_BT, None if reference is None else reference.state_BTD)
    return in_chunks(terms, arrays, chunks_of(*tokens_BT.shape, head.vocab_size))
