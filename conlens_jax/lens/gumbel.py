"""Sampling a token differentiably: Gumbel-max forward, Gumbel-Softmax backward, straight-through.

With noise g ~ Gumbel(0, 1) a token is y = argmax(logits + g), an exact sample of the softmax of
the logits (Gumbel 1954). Its derivative is taken to be that of softmax((logits + g) / tau)
(Jang et al. 2017, arXiv:1611.01144; Maddison et al. 2017, arXiv:1611.00712). The
result is the token's row of an embedding table, never a one-hot vector [.., V].
"""

from __future__ import annotations

import enum
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from conlens_jax.config.estimator import Estimator
from conlens_jax.config.seeds import random_key
from conlens_jax.lens.estimators import logits_cotangent, token_keys
from conlens_jax.models.quantized import Matrix, matmul, take_rows, take_rows_bar

STRAIGHT_THROUGH = Estimator()


class Purpose(enum.IntEnum):
    """What random numbers of one seed are drawn for; each purpose has keys of its own."""

    TRAINING_TEXT = 1
    MEASURED_TEXT = 2
    ESTIMATOR = 3  # noise that an estimator draws in the backward pass
    EXPLANATION = 4
    GAPS = 5  # the words of a target that are replaced


def first_argmax(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """``argmax`` over the vocabulary by two plain reductions; XLA's own, which reduces values and
    indices together, takes three times as long on a CPU."""
    size = logits.shape[-1]
    highest = jnp.max(logits, axis=-1, keepdims=True)
    where = jnp.where(logits == highest, jnp.arange(size, dtype=jnp.int32), size - 1)
    return jnp.min(where, axis=-1)


class Noise(NamedTuple):
    """fp32 Gumbel noise of texts: an array, or one key per token, from which it is drawn on use
    and so never stored for all tokens at once.

    Attributes:
      array: the noise itself, or None.
      keys: one per token, to draw it from, or None.
      scale: one number per token that the drawn noise is multiplied by.
    """

    array: Float[Array, "B T V"] | None = None
    keys: Key[Array, "B T"] | None = None
    scale: Float[Array, "B T"] | None = None

    def values(self, vocab_size: int) -> Float[Array, "B T V"]:
        if self.keys is None:
            return self.array
        draw = lambda key: jax.random.gumbel(key, (vocab_size,), jnp.float32)
        drawn = jax.vmap(draw)(self.keys.reshape(-1)).reshape(*self.keys.shape, vocab_size)
        return drawn if self.scale is None else drawn * self.scale[..., None]

    def at(self, index: Int[Array, ""]) -> Noise:
        """The noise of one token, [B, 1, …]."""
        pick = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1, axis=1)
        return jax.tree.map(pick, self)


def as_noise(noise: Noise | Float[Array, "B T V"]) -> Noise:
    return noise if isinstance(noise, Noise) else Noise(noise)


def drawn_noise(
    keys_B: Key[Array, "B"], text_len: int, scale: Float[Array, ""] | float | None = None
) -> Noise:
    """Noise from one key per example, so that it does not depend on the rest of the batch."""
    keys_BT = token_keys(keys_B, text_len)
    if scale is not None:
        scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), keys_BT.shape)
    return Noise(None, keys_BT, scale)


def example_keys(
    seed: int, step: Int[Array, ""], examples_B: Int[Array, "B"], purpose: Purpose
) -> Key[Array, "B"]:
    """One key per (seed, step, global example, purpose), independent of the number of devices."""
    key = jax.random.fold_in(jax.random.fold_in(random_key(seed), int(purpose)), step)
    return jax.vmap(lambda example: jax.random.fold_in(key, example))(examples_B)


def straight_through_embed(
    logits: Float[Array, "*B V"],
    noise: Float[Array, "*B V"],
    tokens: Int[Array, "*B"],
    embedding_VD: Matrix,
    tau: Float[Array, ""],
    *,
    estimator: Estimator = STRAIGHT_THROUGH,
    keys: Key[Array, "*B"] | None = None,
) -> Float[Array, "*B D"]:
    """Embeddings of sampled tokens, with a gradient to the logits they were sampled from.

    Args:
      logits: what the tokens were drawn from; differentiable.
      noise: the Gumbel noise they were drawn with; zeros for greedy tokens. Not differentiable.
        Noise multiplied by a number s samples at temperature s, independent of ``tau``:
        argmax(logits + s g) = argmax(logits / s + g). Straight-through then takes the softmax of
        (logits + s g) / tau, which is that of (logits / s + g) at tau / s: tau is in units of the
        logits. The other rules are for s = 1.
      tokens: argmax(logits + noise), known from sampling.
      embedding_VD: the embedding table; differentiable.
      tau: temperature of the backward pass. Not differentiable.
      estimator: the backward rule, see :mod:`conlens_jax.lens.estimators`.
      keys: one per token, for an estimator that draws its own noise.

    Returns:
      ``embedding_VD[tokens]``. Backward, the logits get the estimator's cotangent for the
      embedding's cotangent ē (straight-through: p ⊙ (Wē − ⟨p, Wē⟩) / tau with W the table and
      p = softmax((logits + noise) / tau)); the table gets ē added at the rows of the tokens.
    """
    return _embed(estimator, logits, noise, tokens, embedding_VD, tau, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(estimator, logits, noise, tokens, embedding_VD, tau, keys):
    del estimator, logits, noise, tau, keys
    return take_rows(embedding_VD, tokens)


def _forward(estimator, *inputs):
    return _embed(estimator, *inputs), inputs


def _backward(estimator, residuals, cotangent):
    logits, noise, tokens, embedding_VD, tau, keys = residuals
    w = matmul(cotangent, embedding_VD.T)
    logits_bar = logits_cotangent(estimator, w, logits, noise, tokens, tau, keys)
    table_bar = take_rows_bar(embedding_VD, tokens, cotangent)
    return logits_bar.astype(logits.dtype), None, None, table_bar, None, None


_embed.defvjp(_forward, _backward)
