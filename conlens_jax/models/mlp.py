"""The MLP of a layer, and the mixture of experts that replaces it.

Every expert is computed for every token and weighted afterwards, most of them with zero: plain
products, so that known products in the backward pass, adapters and int8 work for experts as for any
matrix. ``jax.lax.ragged_dot`` over tokens sorted by expert would compute only the chosen ones, but
except on TPUs XLA turns it into the product of every row with every expert under a mask, and there
are k times as many rows (16 experts, k = 2, on a CPU: 2.6 times as slow as the code here).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    weights_BSE = router_weights(products("bsd,de->bse", x_BSD, "router"), config)
    gate = products("bsd,edf->bsef", x_BSD, "gate") if config.gated_mlp else None
    hidden_BSEF = activate(gate, products("bsd,edf->bsef", x_BSD, "up"), config)
    out_BSED = products("bsef,efd->bsed", hidden_BSEF, "down")
    return jnp.einsum("bse,bsed->bsd", weights_BSE.astype(out_BSED.dtype), out_BSED)


def router_weights(
    logits_BSE: Float[Array, "B S E"], config: TransformerConfig
) -> Float[Array, "B S E"]:
    """Softmax over the experts with the k largest logits, fp32, zero for the others; or (not
    ``router_normalized``) the softmax over all experts at those k."""
    logits_BSE = logits_BSE.astype(jnp.float32)
    _, chosen_BSk = jax.lax.top_k(logits_BSE, config.experts_per_token)
    is_chosen_BSE = jax.nn.one_hot(chosen_BSk, config.n_experts, dtype=bool).any(axis=-2)
    if config.router_normalized:
        return jax.nn.softmax(jnp.where(is_chosen_BSE, logits_BSE, -jnp.inf), axis=-1)
    return jnp.where(is_chosen_BSE, jax.nn.softmax(logits_BSE, axis=-1), 0.0)


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
