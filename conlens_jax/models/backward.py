"""The backward pass through a stack of layers by hand: all tokens at once, or one by one.

:func:`forward_with_residuals` is the forward pass that keeps, of each layer, its input and the
results of its matrix products. From these :func:`layers_vjp` makes the usual gradients. And
:class:`TokenPullBack` goes back token by token, from the last to the first, as decoding went
forward: where the cotangent of a token's output depends on the gradient at the tokens behind it
(a sampled text is such a case), this is the exact gradient for the price of one backward pass.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conlens_jax.models.attention import (
    attention_scores,
    attention_weights,
    cap_slope,
    heads_first,
    heads_last,
    mix_values,
    scores_cotangent,
)
from conlens_jax.models.block import (
    Block,
    Residuals,
    attention_inputs,
    layer_output,
    score_form,
)
from conlens_jax.models.layer_kinds import Layers, mask_and_rope_of, params_of
from conlens_jax.models.param_table import Params
from conlens_jax.models.products import Products
from conlens_jax.models.quantized import split_frozen, zeros_bar
from conlens_jax.models.transformer import Patches, scan_layers
from conlens_jax.models.transformer_config import TransformerConfig


def forward_with_residuals(
    layers: Layers,
    x_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    *,
    config: TransformerConfig,
    patches: Patches | None = None,
) -> tuple[Float[Array, "B S D"], Residuals]:
    """:func:`~conlens_jax.models.transformer.run_layers`, and what the backward pass needs.

    With ``config.remat="full"`` the products are made again there instead of being kept.
    """
    x_BSD, kept = scan_layers(layers, x_BSD, positions_BS, config, None, patches)
    return x_BSD, kept._replace(products={}) if config.remat == "full" else kept


def layers_vjp(
    layers: Layers,
    kept: Residuals,
    out_bar_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    *,
    config: TransformerConfig,
    patch_at: Int[Array, ""] | None = None,
) -> tuple[Params, Float[Array, "B S D"], Float[Array, "n B D"] | None]:
    """Cotangents of the parameters, of the input and (with ``patch_at``) of the patches."""
    mask_and_rope, place_N = mask_and_rope_of(layers, positions_BS, None, config)

    def back(x_bar_BSD: Array, layer):
        weights, kept, place = layer

        trained, frozen = split_frozen(weights)

        def run(trained, x_BSD):
            inputs = (x_BSD, None, None, kept.products, place, mask_and_rope, None)
            return Block(config).apply({"params": {**trained, **frozen}}, *inputs)[0]

        _, pull = jax.vjp(run, trained, kept.inputs_BSD)
        weights_bar, x_bar_BSD = pull(x_bar_BSD)
        # The patch was added to the input, which is what was kept.
        patch_bar_BD = None if patch_at is None else x_bar_BSD[:, patch_at]
        return x_bar_BSD, (weights_bar, patch_bar_BD)

    stack = (params_of(layers), kept, place_N)
    x_bar_BSD, (layers_bar, patches_bar) = jax.lax.scan(
        back, out_bar_BSD, stack, reverse=True, unroll=config.unroll or len(kept.keys)
    )
    _, frozen = split_frozen(params_of(layers))
    return {**layers_bar, **zeros_bar(frozen)}, x_bar_BSD, patches_bar


class Later(NamedTuple):
    """What the tokens behind the present one want of its keys and values, for n layers; rows of t
    queries, zero where they have not been visited yet.

    Attributes:
      scores_bar: the cotangent of scale · ⟨q, k⟩, times the scale.
      mixed_bar: the cotangent of what attention gave.
    """

    scores_bar: Float[Array, "n B K G t C"]
    mixed_bar: Float[Array, "n B K G t X"]


class Read(NamedTuple):
    """How t tokens read the keys: known for all of them before the first is visited.

    Attributes:
      slope: derivative of the scores' soft cap; None without one.
    """

    queries: Float[Array, "*n B K G t X"]
    weights: Float[Array, "*n B K G t C"]
    slope: Float[Array, "*n B K G t C"] | None


class TokenPullBack:
    """Vector-Jacobian products of the last t tokens of a pass, from the last to the first.

    Args:
      kept: of the whole pass (:func:`forward_with_residuals`).
      first: index of the first of the t tokens.
    """

    def __init__(
        self,
        layers: Layers,
        kept: Residuals,
        positions_BS: Int[Array, "B S"],
        first: int,
        config: TransformerConfig,
    ):
        self.layers, self.config, self.first = params_of(layers), config, first
        self.keys, self.values = kept.keys, kept.values
        self.mask_and_rope, self.place_N = mask_and_rope_of(layers, positions_BS, None, config)
        tail = lambda array: array[:, :, first:]
        self.inputs, self.products = tail(kept.inputs_BSD), jax.tree.map(tail, kept.products)
        text = self.mask_and_rope.at_queries(first, positions_BS.shape[1] - first)

        def read(layer) -> Read:
            weights, x_BtD, products, keys, place = layer
            here, form = text.of(place), score_form(place, weights, config)
            made = attention_inputs(x_BtD, Products(weights, products), here.rotation, config)
            scores = attention_scores(made[0], keys, form)
            mix = attention_weights(scores, here.mask, form)
            return Read(made[0], mix, cap_slope(scores, form))

        stack = (self.layers, self.inputs, self.products, self.keys, self.place_N)
        self.read = jax.lax.map(read, stack)

    def start(self) -> Later:
        """Nothing is wanted yet."""
        return Later(
            jnp.zeros_like(self.read.weights),
            jnp.zeros(self.read.queries.shape, self.values.dtype),
        )

    def __call__(
        self, token: Int[Array, ""], out_bar_BD: Float[Array, "B D"], later: Later
    ) -> tuple[Float[Array, "B D"], Later]:
        """The cotangent of the token's input, once all tokens behind it have been visited.

        Args:
          token: 0 … t − 1; each once, from the last to the first.
          out_bar_BD: the complete cotangent of its output.
        """
        at = self.first + token
        pick = lambda array, axis, index=token: jax.lax.dynamic_slice_in_dim(array, index, 1, axis)
        config, mask_and_rope = self.config, self.mask_and_rope.at_queries(at, 1)

        def back(out_bar_B1D: Array, layer):
            weights, x_B1D, products, own_read, keys, values, read, later, place = layer
            here, form = mask_and_rope.of(place), score_form(place, weights, config)
            attended = heads_last(mix_values(own_read.weights, values))
            finish = lambda x, attended: layer_output(
                x, attended, Products(weights, products), config
            )
            _, pull_output = jax.vjp(finish, x_B1D, attended)
            x_bar, attended_bar = pull_output(out_bar_B1D)
            mixed_bar = heads_first(attended_bar, config.n_kv_heads)
            mix_bar = jnp.einsum(
                "bkgsx,bkcx->bkgsc", mixed_bar, values, preferred_element_type=jnp.float32
            )
            scores_bar = scores_cotangent(own_read.weights, mix_bar, own_read.slope) * form.scale
            query_bar = mix_values(scores_bar, keys)
            # This token's key and value, as the tokens behind it and it itself have used them.
            own = lambda array: pick(array, 4, at)[..., 0].astype(keys.dtype)
            collect = functools.partial(jnp.einsum, "bkgt,bkgtx->bkx")
            key_bar = collect(own(later.scores_bar), read.queries)
            key_bar += collect(own(scores_bar), own_read.queries)
            value_bar = collect(own(read.weights), later.mixed_bar)
            value_bar += collect(own(own_read.weights), mixed_bar)
            begin = lambda x: attention_inputs(
                x, Products(weights, products), here.rotation, config
            )
            _, pull_inputs = jax.vjp(begin, x_B1D)
            bars = query_bar, key_bar[:, :, None], value_bar[:, :, None]
            return x_bar + pull_inputs(bars)[0], Later(scores_bar, mixed_bar)

        stack = (
            self.layers,
            pick(self.inputs, 2),
            jax.tree.map(lambda array: pick(array, 2), self.products),
            jax.tree.map(lambda array: pick(array, 4), self.read),
            self.keys,
            self.values,
            self.read,
            later,
            self.place_N,
        )
        x_bar, rows = jax.lax.scan(
            back,
            out_bar_BD[:, None],
            stack,
            reverse=True,
            unroll=config.unroll or len(self.keys),
        )
        write = lambda all_rows, row: jax.lax.dynamic_update_slice_in_dim(all_rows, row, token, 4)
        return x_bar[:, 0], jax.tree.map(write, later, rows)
