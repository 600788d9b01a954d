"""Sampling a token differentiably: Gumbel-max forward, Gumbel-Softmax backward, straight-through.

With noise g ~ Gumbel(0, 1) a token is y = argmax(logits + g), an exact sample of the softmax of
the logits (Gumbel 1954). Its derivative is taken to be that of softmax((logits + g) / tau)
(Jang et al. 2017, arXiv:1611.01144; Maddison et al. 2017, arXiv:1611.00712). What leaves this
file is never a [.., V] one-hot vector but the token's row of an embedding table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def gumbel_noise(keys_B: Key[Array, "B"], text_len: int, vocab_size: int) -> Float[Array, "B T V"]:
    """fp32 noise, one key an example, so that it does not depend on the batch around it."""
    draw = lambda key: jax.random.gumbel(key, (text_len, vocab_size), jnp.float32)
    return jax.vmap(draw)(keys_B)


def example_keys(
    seed: int, step: Int[Array, ""], examples_B: Int[Array, "B"], purpose: int
) -> Key[Array, "B"]:
    """A key for each (seed, step, global example, purpose), whatever the number of devices."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)
    return jax.vmap(lambda example: jax.random.fold_in(key, example))(examples_B)


@jax.custom_vjp
def straight_through_embed(
    logits: Float[Array, "*B V"],
    noise: Float[Array, "*B V"],
    tokens: Int[Array, "*B"],
    embedding_VD: Float[Array, "V D"],
    tau: Float[Array, ""],
) -> Float[Array, "*B D"]:
    """Embeddings of sampled tokens, with the straight-through gradient to the logits.

    Args:
      logits: what the tokens were drawn from; differentiable.
      noise: the Gumbel noise they were drawn with; zeros for greedy tokens. Not differentiable.
      tokens: argmax(logits + noise), already known from sampling.
      embedding_VD: the table that is looked up; differentiable.
      tau: temperature of the backward pass. Not differentiable.

    Returns:
      ``embedding_VD[tokens]``. Backward, with p = softmax((logits + noise) / tau) and the
      cotangent ē: logits get p ⊙ (Eē − ⟨p, Eē⟩) / tau, the table gets ē added at the tokens.
    """
    del logits, noise, tau
    return jnp.take(embedding_VD, tokens, axis=0)


def _forward(logits, noise, tokens, embedding_VD, tau):
    embedded = straight_through_embed(logits, noise, tokens, embedding_VD, tau)
    return embedded, (logits, noise, tokens, embedding_VD, tau)


def _backward(residuals, cotangent):
    logits, noise, tokens, embedding_VD, tau = residuals
    soft = jax.nn.softmax((logits.astype(jnp.float32) + noise) / tau, axis=-1)
    wanted = jnp.matmul(cotangent, embedding_VD.T).astype(jnp.float32)
    centred = wanted - jnp.sum(soft * wanted, axis=-1, keepdims=True)
    logits_bar = (soft * centred / tau).astype(logits.dtype)
    table_bar = jnp.zeros_like(embedding_VD).at[tokens].add(cotangent)
    return logits_bar, None, None, table_bar, None


straight_through_embed.defvjp(_forward, _backward)
