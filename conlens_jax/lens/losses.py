"""The terms of the loss, one value per row, computed in fp32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def kl_divergence(
    target_logits: Float[Array, "*B V"], logits: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """KL(target ‖ other) over the whole vocabulary, in nats; differentiable in both."""
    log_p = jax.nn.log_softmax(target_logits.astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def entropy(logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Entropy of the softmax of the logits, in nats."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def cross_entropy(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """−log p of the tokens, in nats."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def log_not_token(logits: Float[Array, "*B V"], token: int) -> Float[Array, "*B"]:
    """log(1 − p) of one token, in nats; exact where p is almost 1."""
    wide = logits.astype(jnp.float32)
    others = jnp.where(jnp.arange(wide.shape[-1]) == token, -jnp.inf, wide)
    return jax.nn.logsumexp(others, axis=-1) - jax.nn.logsumexp(wide, axis=-1)


def direction_error(
    reconstruction: Float[Array, "*B D"], activation: Float[Array, "*B D"]
) -> Float[Array, "*B"]:
    """‖n(â) − n(a)‖² / D with n(v) = √D v / ‖v‖, which is 2 (1 − cos)."""
    return 2.0 - 2.0 * jnp.sum(_unit(reconstruction) * _unit(activation), axis=-1)


def norm_error(
    reconstruction: Float[Array, "*B D"], activation: Float[Array, "*B D"]
) -> Float[Array, "*B"]:
    """(r − 1)² with r = ‖â‖ / ‖a‖.

    The relative squared error is ‖â − a‖² / ‖a‖² = (r − 1)² + 2 r (1 − cos): this is its first
    part. The direction error alone does not constrain the norm of â, which M reads.
    """
    ratio_squared = jnp.sum(jnp.square(reconstruction.astype(jnp.float32)), axis=-1) / (
        jnp.sum(jnp.square(activation.astype(jnp.float32)), axis=-1) + 1e-12
    )
    return jnp.square(jnp.sqrt(ratio_squared + 1e-12) - 1.0)


def squared_error(
    reconstruction: Float[Array, "*B D"],
    activation: Float[Array, "*B D"],
    mean_square_norm: Float[Array, ""],
) -> Float[Array, "*B"]:
    """‖â − a‖² over the mean ‖a‖² of the training activations."""
    difference = reconstruction.astype(jnp.float32) - activation.astype(jnp.float32)
    return jnp.sum(jnp.square(difference), axis=-1) / mean_square_norm


def reconstruction_error(
    reconstruction: Float[Array, "*B D"],
    activation: Float[Array, "*B D"],
    statistics: dict[str, Array],
    kind: str,
) -> Float[Array, "*B"]:
    """The error of a reconstruction, of the kind ``loss.mse_kind``."""
    if kind == "direction":
        return direction_error(reconstruction, activation)
    if kind == "direction+norm":
        return direction_error(reconstruction, activation) + norm_error(reconstruction, activation)
    mean, scale = statistics["mean"], statistics["scale"]
    mean_square_norm = jnp.sum(jnp.square(mean)) + mean.shape[0] * jnp.square(scale)
    return squared_error(reconstruction, activation, mean_square_norm)


def _unit(vector: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    wide = vector.astype(jnp.float32)
    # The epsilon inside the root keeps the gradient at a zero vector finite.
    return wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + 1e-12)
