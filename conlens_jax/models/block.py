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
from conlens_jax.models.transformer_config import ACTIVATIONS, TransformerConfig


class Residuals(NamedTuple):
    """Intermediate results of a layer, for its backward pass and the cache; stacked over n layers,
    ``n`` is the first dimension.

    Attributes:
      inputs_BSD: the residual stream at its input, patch included.
      products: the result of every matrix product, by the matrix's name.
      keys, values: those that the queries were compared with; keys are rotated.
      own_inputs_BSI: see :class:`Besides`; only where they are kept for a backward pass.
    """

    inputs_BSD: Float[Array, "*n B S D"]
    products: dict[str, Array]
    keys: Float[Array, "*n B K S X"]
    values: Float[Array, "*n B K S X"]
    own_inputs_BSI: Float[Array, "*n B S I"] | None = None


KeysAndValues = tuple[Float[Array, "B K S X"], Float[Array, "B K S X"]]


class Besides(NamedTuple):
    """What a layer reads of its tokens besides the residual stream.

    Attributes:
      input_BSI: its own input; None in a model without.
      earlier: keys and values of the layer whose keys it shares, if it shares any (otherwise they
        are not used); None in a model where none does.
    """

    input_BSI: Float[Array, "B S I"] | None = None
    earlier: KeysAndValues | None = None


NOTHING_BESIDES = Besides()


def run_block(
    weights: Params,
    x_BSD: Float[Array, "B S D"],
    past: tuple[Float[Array, "B K C X"], Float[Array, "B K C X"]] | None,
    patch_BD: Float[Array, "B D"] | None,
    known: dict[str, Array] | None,
    index: LayerIndex,
    mask_and_rope: MaskAndRope,
    patch_at: Int[Array, ""] | None,
    besides: Besides = NOTHING_BESIDES,
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
    query, key, value = attention_inputs(x_BSD, products, here, index, config, besides.earlier)
    form = score_form(index, weights, config)
    if past is None and flash.is_usable(config):
        attended = flash.attend(query, key, value, here.mask, form.scale)
    else:
        attended = attend(query, (key, value), here.mask, form, past, here.past_mask)
    out_BSD = layer_output(x_BSD, attended, products, config, besides.input_BSI)
    return out_BSD, Residuals(x_BSD, products.made, key, value)


def score_form(index: LayerIndex, weights: Params, config: TransformerConfig) -> ScoreForm:
    scale = config.attention_scales[0] if index.scale is None else index.scale
    sinks_H = weights["sinks"] if config.attention_sinks else None
    return ScoreForm(scale, config.attention_soft_cap, sinks_H)


def attention_inputs(
    x_BSD: Float[Array, "B S D"],
    products: Products,
    here: MaskAndRope,
    index: LayerIndex,
    config: TransformerConfig,
    earlier: KeysAndValues | None = None,
) -> tuple[Float[Array, "B K G S X"], Float[Array, "B K S X"], Float[Array, "B K S X"]]:
    """Rotated queries and keys, and values, heads first; no token sees another here.

    Args:
      here: of the layer's kind, at these tokens.
      earlier: see :class:`Besides`.
    """
    weights = products.weights
    if config.pre_norms:
        x_BSD = apply_norm(x_BSD, weights, "attention_norm", config)
    query = products("bsd,dhx->bshx", x_BSD, "query")
    key = products("bsd,dkx->bskx", x_BSD, "key")
    value = products("bsd,dkx->bskx", x_BSD, "value")
    if index.values_are_keys is not None:
        value = jnp.where(index.values_are_keys, key, value)
    if config.qk_norm:
        n_dims = 2 if config.qk_norm == "width" else 1
        query = apply_norm(query, weights, "query_norm", config, n_dims, index.width)
        key = apply_norm(key, weights, "key_norm", config, n_dims, index.width)
    if config.value_norm:
        value = apply_norm(value, weights, "", config, width=index.width)
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
    return query, *_keys_and_values(key_heads_first(key), key_heads_first(value), index, earlier)


def _keys_and_values(
    key: Float[Array, "B K S X"],
    value: Float[Array, "B K S X"],
    index: LayerIndex,
    earlier: KeysAndValues | None,
) -> KeysAndValues:
    """Those for each group of queries, in the layers of several shapes; or those of an earlier
    layer."""
    if index.key_heads is not None:
        key, value = (jnp.take(x, index.key_heads, axis=1) for x in (key, value))
    if earlier is not None:
        key = jnp.where(index.shares, earlier[0], key)
        value = jnp.where(index.shares, earlier[1], value)
    return key, value


def layer_output(
    x_BSD: Float[Array, "B S D"],
    attended_BSHX: Float[Array, "B S H X"],
    products: Products,
    config: TransformerConfig,
    input_BSI: Float[Array, "B S I"] | None = None,
) -> Float[Array, "B S D"]:
    """The layer after attention; no token sees another here. ``input_BSI``: see
    :class:`Besides`."""
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
    out_BSD = between_BSD + _scaled(written_BSD, config)
    if input_BSI is not None:
        out_BSD = out_BSD + _read_input(out_BSD, input_BSI, products, config)
    return out_BSD * weights["output_scale"][0] if config.output_scales else out_BSD


def _read_input(
    x_BSD: Float[Array, "B S D"],
    input_BSI: Float[Array, "B S I"],
    products: Products,
    config: TransformerConfig,
) -> Float[Array, "B S D"]:
    """norm(W₂ (act(W₁ x) ⊙ p)) for the layer's own input p."""
    gate_BSI = ACTIVATIONS[config.activation](products("bsd,di->bsi", x_BSD, "input_gate"))
    written_BSD = products("bsi,id->bsd", gate_BSI * input_BSI, "input_projection")
    return apply_norm(written_BSD, products.weights, "input_norm", config)


def _scaled(written_BSD: Float[Array, "B S D"], config: TransformerConfig) -> Float[Array, "B S D"]:
    """Times ``residual_scale``, rounded once as in transformers."""
    if config.residual_scale == 1:
        return written_BSD
    scaled = written_BSD.astype(jnp.float32) * config.residual_scale
    return scaled.astype(written_BSD.dtype)
