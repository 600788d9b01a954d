"""One layer of the transformer: attention and an MLP, each with its norms, on a residual stream."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float

from conlens_jax.models import flash, rope
from conlens_jax.models.attention import ScoreForm, attend, heads_first, key_heads_first
from conlens_jax.models.layer_kinds import LayerIndex
from conlens_jax.models.mlp import mix_experts, mlp
from conlens_jax.models.norms import apply_norm
from conlens_jax.models.param_table import Params
from conlens_jax.models.products import Products
from conlens_jax.models.transformer_config import TransformerConfig


class Residuals(NamedTuple):
    """What a layer made on its way from input to output; stacked over n layers, ``n`` in front.

    Attributes:
      inputs_BSD: the residual stream at its input (with its patch).
      products: the result of every matrix product, by the matrix's name.
      keys: rotated.
    """

    inputs_BSD: Float[Array, "*n B S D"]
    products: dict[str, Array]
    keys: Float[Array, "*n B K S X"]
    values: Float[Array, "*n B K S X"]


class Block(nn.Module):
    """A layer. Its parameters are whatever it is given: the ``layers`` rows of the family's table,
    and the adapters of these where there are any."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BSD, past, patch_BD, known, place: LayerIndex, mask_and_rope, patch_at):
        """Returns the output, and what the layer made on its way (:class:`Residuals`)."""
        config, here = self.config, mask_and_rope.of(place)
        weights = dict(self.variables["params"])
        if patch_BD is not None:
            x_BSD = x_BSD.at[:, patch_at].add(patch_BD.astype(x_BSD.dtype))
        products = Products(weights, known)
        query, key, value = attention_inputs(x_BSD, products, here.rotation, config)
        form = score_form(place, weights, config)
        if past is None and flash.is_usable(config):
            attended = flash.attend(query, key, value, here.mask, form.scale)
        else:
            attended = attend(query, (key, value), here.mask, form, past, here.past_mask)
        out_BSD = layer_output(x_BSD, attended, products, config)
        return out_BSD, Residuals(x_BSD, products.made, key, value)


def score_form(place: LayerIndex, weights: Params, config: TransformerConfig) -> ScoreForm:
    scale = config.attention_scales[0] if place.scale is None else place.scale
    sinks_H = weights["sinks"] if config.attention_sinks else None
    return ScoreForm(scale, config.attention_soft_cap, sinks_H)


def attention_inputs(
    x_BSD: Float[Array, "B S D"],
    products: Products,
    rotation: tuple[Array, Array] | None,
    config: TransformerConfig,
) -> tuple[Float[Array, "B K G S X"], Float[Array, "B K S X"], Float[Array, "B K S X"]]:
    """Rotated queries and keys, and values, heads first; each token's from that token alone."""
    weights = products.weights
    if config.pre_norms:
        x_BSD = apply_norm(x_BSD, weights, "attention_norm", config)
    query = products("bsd,dhx->bshx", x_BSD, "query")
    key = products("bsd,dkx->bskx", x_BSD, "key")
    value = products("bsd,dkx->bskx", x_BSD, "value")
    if config.qk_norm:
        query = apply_norm(query, weights, "query_norm", config)
        key = apply_norm(key, weights, "key_norm", config)
    if rotation is not None:
        query, key = rope.rotate(query, rotation), rope.rotate(key, rotation)
    query = heads_first(query, config.n_kv_heads)
    return query, key_heads_first(key), key_heads_first(value)


def layer_output(
    x_BSD: Float[Array, "B S D"],
    attended_BSHX: Float[Array, "B S H X"],
    products: Products,
    config: TransformerConfig,
) -> Float[Array, "B S D"]:
    """What follows attention; each token's from that token alone."""
    weights = products.weights
    written_BSD = products("bshx,hxd->bsd", attended_BSHX, "attention_out")
    if config.post_norms:
        written_BSD = apply_norm(written_BSD, weights, "attention_post_norm", config)
    between_BSD = x_BSD + written_BSD
    read_BSD = x_BSD if config.parallel_residual else between_BSD
    if config.pre_norms:
        read_BSD = apply_norm(read_BSD, weights, "mlp_norm", config)
    written_BSD = (mix_experts if config.n_experts else mlp)(read_BSD, products, config)
    if config.post_norms:
        written_BSD = apply_norm(written_BSD, weights, "mlp_post_norm", config)
    return between_BSD + written_BSD
