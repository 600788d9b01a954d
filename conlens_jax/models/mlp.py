"""The MLP of a layer, and the mixture of experts that replaces it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conlens_jax.models.experts import Choice, form_of
from conlens_jax.models.products import Products
from conlens_jax.models.transformer_config import ACTIVATIONS, TransformerConfig


def mlp(
    x_BSD: Float[Array, "B S D"], products: Products, config: TransformerConfig
) -> Float[Array, "B S D"]:
    gate = products("bsd,df->bsf", x_BSD, "gate") if config.gated_mlp else None
    hidden_BSF = activate(gate, products("bsd,df->bsf", x_BSD, "up"), config)
    return products("bsf,fd->bsd", hidden_BSF, "down")


def mix_experts(
    x_BSD: Float[Array, "B S D"], products: Products, config: TransformerConfig
) -> Float[Array, "B S D"]:
    """The experts' outputs, each weighted by the router (Shazeer et al. 2017, arXiv:1701.06538)."""
    logits_BSE = products("bsd,de->bse", x_BSD, "router")
    weights_BSk, experts_BSk = route(logits_BSE.astype(jnp.float32), config)
    form = form_of(config)
    if form == "dense":
        # Plain products with all experts, most of them with weight zero.
        choice, dim = None, "e"
        chosen_BSkE = jax.nn.one_hot(experts_BSk, config.n_experts, dtype=weights_BSk.dtype)
        weights = jnp.sum(weights_BSk[..., None] * chosen_BSkE, axis=-2)
    else:
        choice, dim, weights = Choice(experts_BSk, form), "k", weights_BSk
    up = f"bsd,edf->bs{dim}f"
    gate = products(up, x_BSD, "gate", choice) if config.gated_mlp else None
    hidden = activate(gate, products(up, x_BSD, "up", choice), config)
    out = products(f"bs{dim}f,efd->bs{dim}d", hidden, "down", choice)
    return jnp.einsum(f"bs{dim},bs{dim}d->bsd", weights.astype(out.dtype), out)


def route(
    logits_BSE: Float[Array, "B S E"], config: TransformerConfig
) -> tuple[Float[Array, "B S k"], Int[Array, "B S k"]]:
    """The k experts with the largest logits and their weights: the softmax over these k, or (not
    ``router_normalized``) the softmax over all experts at them."""
    top_BSk, experts_BSk = jax.lax.top_k(logits_BSE, config.experts_per_token)
    if config.router_normalized:
        return jax.nn.softmax(top_BSk, axis=-1), experts_BSk
    weights_BSE = jax.nn.softmax(logits_BSE, axis=-1)
    return jnp.take_along_axis(weights_BSE, experts_BSk, axis=-1), experts_BSk


def activate(
    gate: Float[Array, "*B F"] | None, up: Float[Array, "*B F"], config: TransformerConfig
) -> Float[Array, "*B F"]:
    """act(up), act(gate) · up, or gpt-oss's gate · σ(α gate) · (up + 1) with both clamped."""
    act = ACTIVATIONS[config.activation]
    if gate is None:
        return act(up)
    if not config.swiglu_limit:
        return act(gate) * up
    gate = jnp.minimum(gate, config.swiglu_limit)
    up = jnp.clip(up, -config.swiglu_limit, config.swiglu_limit)
    return gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1)
