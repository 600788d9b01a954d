"""Backward rules for a sampled token: from the cotangent of its embedding to that of its logits.

With w = W ē, W the embedding table [V, D] (w is the first-order effect of each token of the
vocabulary on the loss), and the softmax Jacobian J_p w = p ⊙ (w − ⟨p, w⟩):

    straight-through   J_q w / tau,  q = softmax((θ + g) / tau)      biased, one noise draw
    Gumbel-Rao(k)      the mean of that over k draws of g given the token that was chosen
                       (Paulus, Maddison & Krause 2021, arXiv:2010.04838): the same mean, less
                       variance
    ReinMax            2 J_r w − ½ J_p w,  r = (onehot(y) + softmax(θ / tau)) / 2,  p = softmax(θ)
                       (Liu et al. 2023, arXiv:2304.08612): second order in the step from token to
                       token; at tau = 1 unbiased for a quadratic function of one token's embedding

Everything is fp32; no one-hot vector is materialised.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from conlens_jax.config.estimator import Estimator


def logits_cotangent(
    estimator: Estimator,
    w: Float[Array, "*B V"],
    logits: Float[Array, "*B V"],
    noise: Float[Array, "*B V"],
    tokens: Int[Array, "*B"],
    tau: Float[Array, ""],
    keys: Key[Array, "*B"] | None,
) -> Float[Array, "*B V"]:
    """The estimator's cotangent of the logits.

    Args:
      w: W ē, the product of the embedding table with the cotangent of the embedding.
      noise: the Gumbel noise that ``tokens`` were sampled with (straight-through).
      keys: one per token, for the draws of Gumbel-Rao.

    Raises:
      ValueError: Gumbel-Rao without keys.
    """
    logits, w = logits.astype(jnp.float32), w.astype(jnp.float32)
    if estimator.kind == "reinmax":
        return _reinmax(w, logits, tokens, tau)
    if estimator.kind == "gumbel_rao":
        if keys is None:
            raise ValueError("Gumbel-Rao draws its own noise: pass one key per token")
        return _gumbel_rao(estimator.samples, w, logits, tokens, tau, keys)
    return softmax_jacobian(jax.nn.softmax((logits + noise) / tau, axis=-1), w) / tau


def softmax_jacobian(p: Float[Array, "*B V"], w: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """J_p w = p ⊙ (w − ⟨p, w⟩)."""
    return p * (w - jnp.sum(p * w, axis=-1, keepdims=True))


def _reinmax(w: Array, logits: Array, tokens: Array, tau: Array) -> Array:
    chosen = jnp.take_along_axis(w, tokens[..., None], axis=-1)
    soft = jax.nn.softmax(logits / tau, axis=-1)
    # ⟨r, w⟩ and r ⊙ (w − ⟨r, w⟩) with r = (onehot + soft) / 2; the one-hot part is one entry.
    mean = 0.5 * (chosen + jnp.sum(soft * w, axis=-1, keepdims=True))
    first = 0.5 * soft * (w - mean)
    first = jnp.put_along_axis(
        first,
        tokens[..., None],
        jnp.take_along_axis(first, tokens[..., None], axis=-1) + 0.5 * (chosen - mean),
        axis=-1,
        inplace=False,
    )
    return 2.0 * first - 0.5 * softmax_jacobian(jax.nn.softmax(logits, axis=-1), w)


def _gumbel_rao(
    samples: int, w: Array, logits: Array, tokens: Array, tau: Array, keys: Array
) -> Array:
    def add(total, index):
        noisy = conditional_gumbel(logits, tokens, _fold(keys, index))
        return total + softmax_jacobian(jax.nn.softmax(noisy / tau, axis=-1), w) / tau, None

    # One draw at a time: the memory does not grow with their number.
    total, _ = jax.lax.scan(add, jnp.zeros_like(w), jnp.arange(samples))
    return total / samples


def conditional_gumbel(
    logits: Float[Array, "*B V"], tokens: Int[Array, "*B"], keys: Key[Array, "*B"]
) -> Float[Array, "*B V"]:
    """A draw of logits + g given that its argmax is the token; see :func:`condition_on_token`."""
    vocab_size = logits.shape[-1]
    draw = lambda key: jax.random.exponential(key, (vocab_size,), jnp.float32)
    spread = jax.vmap(draw)(keys.reshape(-1)).reshape(logits.shape)
    return condition_on_token(
        logits, tokens, -jnp.log(jnp.maximum(spread, jnp.finfo(jnp.float32).tiny))
    )


def condition_on_token(
    logits: Float[Array, "*B V"], tokens: Int[Array, "*B"], noise: Float[Array, "*B V"]
) -> Float[Array, "*B V"]:
    """Independent noise turned into logits + g whose argmax is the token (Maddison et al. 2014,
    A* sampling).

    With independent noise e and Z = Σ exp(θ): the maximum is m = e_y + ln Z for any token y, and
    every other entry is θ_j + e_j, truncated below it: −ln(exp(−θ_j − e_j) + exp(−m)).

    Args:
      noise: independent Gumbel(0, 1), independent of the tokens.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top = jnp.take_along_axis(noise, tokens[..., None], axis=-1) + log_z
    others = -jnp.logaddexp(-noise - logits, -top)
    return jnp.put_along_axis(others, tokens[..., None], top, axis=-1, inplace=False)


def token_keys(keys_B: Key[Array, "B"], text_len: int) -> Key[Array, "B T"]:
    """One key per token of each text."""
    positions = jnp.arange(text_len)
    return jax.vmap(lambda key: jax.vmap(lambda t: jax.random.fold_in(key, t))(positions))(keys_B)


def _fold(keys: Array, index: Array) -> Array:
    flat = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys.reshape(-1))
    return flat.reshape(keys.shape)
