"""One layer of the transformer: attention and an MLP, each with its norms, on a residual stream."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conlens_jax.models import flash, rope
from conlens_jax.models.attention import ScoreForm, attend, heads_first, key_heads_first
from conlens_jax.models.layer_kinds import LayerIndex, MaskAndRope
from conlens_jax.models.mlp import mix_experts, mlp
from conlens_jax.models.norms import apply_norm
from conlens_jax.models.param_table import Params
from conlens_jax.models.products import Products
from conlens_jax.models.transformer_config import TransformerConfig


class Residuals(NamedTuple):
    """Intermediate results of a layer, for its backward pass and the cache; stacked over n layers,
    ``n`` is the first dimension.

    Attributes:
      inputs_BSD: the residual stream at its input, patch included.
      products: the result of every matrix product, by the matrix's name.
      keys: rotated.
    """

    inputs_BSD: Float[Array, "*n B S D"]
    products: dict[str, Array]
    keys: Float[Array, "*n B K S X"]
    values: Float[Array, "*n B K S X"]


def run_block(
    weights: Params,
    x_BSD: Float[Array, "B S D"],
    past: tuple[Float[Array, "B K C X"], Float[Array, "B K C X"]] | None,
    patch_BD: Float[Array, "B D"] | None,
    known: dict[str, Array] | None,
    index: LayerIndex,
    mask_and_rope: MaskAndRope,
    patch_at: Int[Array, ""] | None,
    *,
    config: TransformerConfig,
) -> tuple[Float[Array, "B S D"], Residuals]:
    """One layer: its output, and its intermediate results.

    Args:
      weights: the layer's parameters, by the last key of their row in the family's table, and
        the adapters of these if there are any.
      past: cached keys and values.
      patch_BD: added to the residual stream at ``patch_at``, at the input.
      known: results of matrix products by name, from a pass with the same input.
      index: which of the kinds in ``mask_and_rope`` the layer is.
    """
    here = mask_and_rope.of(index)
    if patch_BD is not None:
        x_BSD = x_BSD.at[:, patch_at].add(patch_BD.astype(x_BSD.dtype))
    products = Products(weights, known)
    query, key, value = attention_inputs(x_BSD, products, here, config)
    form = score_form(index, weights, config)
    if past is None and flash.is_usable(config):
        attended = flash.attend(query, key, value, here.mask, form.scale)
    else:
        attended = attend(query, (key, value), here.mask, form, past, here.past_mask)
    out_BSD = layer_output(x_BSD, attended, products, config)
    return out_BSD, Residuals(x_BSD, products.made, key, value)


def score_form(index: LayerIndex, weights: Params, config: TransformerConfig) -> ScoreForm:
    scale = config.attention_scales[0] if index.scale is None else index.scale
    sinks_H = weights["sinks"] if config.attention_sinks else None
    return ScoreForm(scale, config.attention_soft_cap, sinks_H)


def attention_inputs(
    x_BSD: Float[Array, "B S D"],
    products: Products,
    here: MaskAndRope,
    config: TransformerConfig,
) -> tuple[Float[Array, "B K G S X"], Float[Array, "B K S X"], Float[Array, "B K S X"]]:
    """Rotated queries and keys, and values, heads first; no token sees another here.

    Args:
      here: of the layer's kind, at these tokens.
    """
    weights = products.weights
    if config.pre_norms:
        x_BSD = apply_norm(x_BSD, weights, "attention_norm", config)
    query = products("bsd,dhx->bshx", x_BSD, "query")
    key = products("bsd,dkx->bskx", x_BSD, "key")
    value = products("bsd,dkx->bskx", x_BSD, "value")
    if config.qk_norm:
        n_dims = 2 if config.qk_norm == "width" else 1
        query = apply_norm(query, weights, "query_norm", config, n_dims)
        key = apply_norm(key, weights, "key_norm", config, n_dims)
    if config.qkv_clip:
        bound = config.qkv_clip
        query, key, value = (jnp.clip(x, -bound, bound) for x in (query, key, value))
    if here.rotation is not None:
        rotate = functools.partial(
            rope.rotate, rotation=here.rotation, interleaved=config.rope.interleaved
        )
        query, key = rotate(query), rotate(key)
    if here.growth is not None:
        query = query * here.growth.astype(query.dtype)
    query = heads_first(query, config.n_kv_heads)
    return query, key_heads_first(key), key_heads_first(value)


def layer_output(
    x_BSD: Float[Array, "B S D"],
    attended_BSHX: Float[Array, "B S H X"],
    products: Products,
    config: TransformerConfig,
) -> Float[Array, "B S D"]:
    """The layer after attention; no token sees another here."""
    weights = products.weights
    written_BSD = products("bshx,hxd->bsd", attended_BSHX, "attention_out")
    if config.post_norms:
        written_BSD = apply_norm(written_BSD, weights, "attention_post_norm", config)
    between_BSD = x_BSD + _scaled(written_BSD, config)
    read_BSD = x_BSD if config.parallel_residual else between_BSD
    if config.pre_norms:
        name = "attention_norm" if config.shared_norm else "mlp_norm"
        read_BSD = apply_norm(read_BSD, weights, name, config)
    written_BSD = (mix_experts if config.n_experts else mlp)(read_BSD, products, config)
    if config.post_norms:
        written_BSD = apply_norm(written_BSD, weights, "mlp_post_norm", config)
    return between_BSD + _scaled(written_BSD, config)


def _scaled(written_BSD: Float[Array, "B S D"], config: TransformerConfig) -> Float[Array, "B S D"]:
    """Times ``residual_scale``, rounded once as in transformers."""
    if config.residual_scale == 1:
        return written_BSD
    scaled = written_BSD.astype(jnp.float32) * config.residual_scale
    return scaled.astype(written_BSD.dtype)
