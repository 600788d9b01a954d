"""Attention without its scores in memory: cuDNN's flash kernel, through JAX's own entry point.

``model.attention="cudnn"`` uses it for whole passes on a GPU. The mask is the kernel's bias
[B, 1, S, S], so padding on either side and windows work as elsewhere. A model that the kernel does
not support falls back to the plain path, with one line in the log.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from conlens_jax.models.attention import heads_last
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.parallel.mesh import target_platform

_LOG = logging.getLogger(__name__)
_MAX_HEAD_DIM = 256


def is_usable(config: TransformerConfig) -> bool:
    """Whether the kernel is configured and supports the model."""
    if config.attention != "cudnn":
        return False
    reasons = obstacles(config, target_platform())
    if reasons:
        _warn_once("; ".join(reasons))
    return not reasons


def obstacles(config: TransformerConfig, backend: str) -> list[str]:
    """Why the kernel cannot be used; empty if it can."""
    checks = {
        f"it runs on a GPU, not on {backend}": backend != "gpu",
        f"it computes in 16 bits, not in {config.dtype}": config.dtype == "float32",
        f"heads must be at most {_MAX_HEAD_DIM} wide and a multiple of 8, not {config.head_dim}": (
            config.head_dim > _MAX_HEAD_DIM or config.head_dim % 8 != 0
        ),
        "it has no soft cap of the scores": bool(config.attention_soft_cap),
        "it has no attention sinks": config.attention_sinks,
        "it has one scale for all layers": config.scale_by_depth,
    }
    return [reason for reason, holds in checks.items() if holds]


@functools.cache
def _warn_once(reasons: str) -> None:
    _LOG.warning('model.attention="cudnn" falls back to "xla": %s', reasons)


def attend(
    query: Float[Array, "B K G S X"],
    key_BKSX: Float[Array, "B K S X"],
    value_BKSX: Float[Array, "B K S X"],
    mask_BSS: Bool[Array, "B S S"],
    scale: float,
) -> Float[Array, "B S H X"]:
    """:func:`conlens_jax.models.attention.attend` of tokens to themselves.

    The kernel's gradient needs an even length: an odd one gets a token at the end that sees only
    itself and that no other token sees.
    """
    length = mask_BSS.shape[-1]
    if length % 2:
        longer = lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, 1), (0, 0)])
        query, key_BKSX, value_BKSX = map(longer, (query, key_BKSX, value_BKSX))
        mask_BSS = jnp.pad(mask_BSS, [(0, 0), (0, 1), (0, 1)]).at[:, -1, -1].set(True)
    attended = jax.nn.dot_product_attention(
        heads_last(query),
        key_BKSX.swapaxes(1, 2),
        value_BKSX.swapaxes(1, 2),
        mask=mask_BSS[:, None],
        scale=scale,
        # Already in the mask; set here too so that the kernel skips the later keys.
        is_causal=True,
        implementation="cudnn",
    )
    return attended[:, :length]
