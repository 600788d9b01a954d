"""The backward pass through a stack of layers by hand: all tokens at once, or one by one.

:func:`forward_with_residuals` is the forward pass that also returns each layer's input and the
results of its matrix products. From these :func:`layers_vjp` computes the usual gradients, and
:class:`TokenVjp` goes back token by token, from the last to the first, the reverse of decoding:
where the cotangent of a token's output depends on the gradient at later tokens (a sampled text is
such a case), this is the exact gradient at the cost of one backward pass.

All three begin with the model's first layer. Where layers have inputs of their own
(:mod:`conlens_jax.models.embeddings`), these are part of the input and of its cotangent. A layer
that shares an earlier one's keys and values hands their cotangents down to it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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
from conlens_jax.models.beside import apart, inputs_of, of_window, with_window
from conlens_jax.models.block import (
    Besides,
    Residuals,
    attention_inputs,
    layer_output,
    run_block,
    score_form,
)
from conlens_jax.models.layer_kinds import Layers, mask_and_rope_of, params_of, span_of
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
    """:func:`~conlens_jax.models.transformer.run_layers` that also returns the residuals for the
    backward pass. With ``config.remat="full"`` the products are recomputed there.
    """
    x_BSD, beside = apart(layers, x_BSD, config)
    x_BSD, made, _ = scan_layers(layers, x_BSD, positions_BS, config, None, patches, beside)
    made = made._replace(own_inputs_BSI=inputs_of(layers, beside))
    return x_BSD, made._replace(products={}) if config.remat == "full" else made


def layers_vjp(
    layers: Layers,
    residuals: Residuals,
    out_bar_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    *,
    config: TransformerConfig,
    patch_at: Int[Array, ""] | None = None,
) -> tuple[Params, Float[Array, "B S D"], Float[Array, "n B D"] | None]:
    """Cotangents of the parameters, of the input and (with ``patch_at``) of the patches."""
    mask_and_rope, index_N = mask_and_rope_of(span_of(layers), positions_BS, None, config)

    def back(carry, layer):
        x_bar_BSD, shared_bar = carry
        weights, residuals, index = layer
        trained, frozen = split_frozen(weights)

        def run(trained, x_BSD, besides):
            weights = {**trained, **frozen}
            inputs = (x_BSD, None, None, residuals.products, index, mask_and_rope, None, besides)
            out_BSD, made = run_block(weights, *inputs, config=config)
            return out_BSD, (made.keys, made.values) if config.n_sharing_layers else None

        earlier = (residuals.keys, residuals.values) if config.n_sharing_layers else None
        besides = Besides(residuals.own_inputs_BSI, earlier)
        _, pull = jax.vjp(run, trained, residuals.inputs_BSD, besides)
        later_bar = of_window(shared_bar, index)
        weights_bar, x_bar_BSD, besides_bar = pull((x_bar_BSD, later_bar))
        shared_bar = with_window(shared_bar, index, besides_bar.earlier)
        # ``inputs_BSD`` is the input with the patch added, so the patch has its cotangent.
        patch_bar_BD = None if patch_at is None else x_bar_BSD[:, patch_at]
        return (x_bar_BSD, shared_bar), (weights_bar, patch_bar_BD, besides_bar.input_BSI)

    stack = (params_of(layers), residuals, index_N)
    carry = (out_bar_BSD, _no_cotangents(residuals.keys, residuals.values, config))
    (x_bar_BSD, _), (layers_bar, patches_bar, own_bar_nBSI) = jax.lax.scan(
        back, carry, stack, reverse=True, unroll=config.unroll or len(residuals.keys)
    )
    _, frozen = split_frozen(params_of(layers))
    x_bar_BSD = _joined(x_bar_BSD, own_bar_nBSI, config)
    return {**layers_bar, **zeros_bar(frozen)}, x_bar_BSD, patches_bar


def _no_cotangents(keys_n: Array, values_n: Array, config: TransformerConfig) -> Any:
    """Zeros for the keys and values that later layers share, without and with a window."""
    if not config.n_sharing_layers:
        return None
    zeros = lambda array: jnp.zeros((2, *array.shape[1:]), array.dtype)
    return zeros(keys_n), zeros(values_n)


def _joined(
    x_bar_BSD: Float[Array, "B S D"],
    own_bar_nBSI: Float[Array, "n B S I"] | None,
    config: TransformerConfig,
) -> Float[Array, "B S E"]:
    """The cotangents of the residual stream and of the layers' own inputs, as one input has them;
    zeros for layers that were not run."""
    if own_bar_nBSI is None:
        return x_bar_BSD
    own_bar = jnp.moveaxis(own_bar_nBSI, 0, 2).reshape(*x_bar_BSD.shape[:2], -1)
    more = config.d_embedding - config.d_model - own_bar.shape[-1]
    own_bar = jnp.pad(own_bar, ((0, 0), (0, 0), (0, more)))
    return jnp.concatenate([x_bar_BSD, own_bar.astype(x_bar_BSD.dtype)], axis=-1)


class Later(NamedTuple):
    """Cotangents of the later tokens' attention, for n layers: of each of t queries, zero for
    those not visited yet.

    Attributes:
      scores_bar: the cotangent of scale · ⟨q, k⟩, times the scale.
      mixed_bar: the cotangent of attention's output.
    """

    scores_bar: Float[Array, "n B K G t C"]
    mixed_bar: Float[Array, "n B K G t X"]


class Read(NamedTuple):
    """Attention of t tokens, computed for all of them before the first is visited.

    Attributes:
      slope: derivative of the scores' soft cap; None without one.
    """

    queries: Float[Array, "*n B K G t X"]
    weights: Float[Array, "*n B K G t C"]
    slope: Float[Array, "*n B K G t C"] | None


class TokenVjp:
    """Vector-Jacobian products of the last t tokens of a pass, from the last to the first.

    Args:
      residuals: of the whole pass (:func:`forward_with_residuals`).
      first: index of the first of the t tokens.
    """

    def __init__(
        self,
        layers: Layers,
        residuals: Residuals,
        positions_BS: Int[Array, "B S"],
        first: int,
        config: TransformerConfig,
    ):
        self.layers, self.config, self.first = params_of(layers), config, first
        self.keys, self.values = residuals.keys, residuals.values
        self.mask_and_rope, self.index_N = mask_and_rope_of(
            span_of(layers), positions_BS, None, config
        )
        tail = lambda array: array[:, :, first:]
        self.inputs = tail(residuals.inputs_BSD)
        self.own_inputs = jax.tree.map(tail, residuals.own_inputs_BSI)
        self.products = jax.tree.map(tail, residuals.products)
        text = self.mask_and_rope.at_queries(first, positions_BS.shape[1] - first)

        def read(layer) -> Read:
            weights, x_BtD, products, keys, index = layer
            here, form = text.of(index), score_form(index, weights, config)
            made = attention_inputs(x_BtD, Products(weights, products), here, index, config)
            scores = attention_scores(made[0], keys, form)
            mix = attention_weights(scores, here.mask, form)
            return Read(made[0], mix, cap_slope(scores, form))

        stack = (self.layers, self.inputs, self.products, self.keys, self.index_N)
        self.read = jax.lax.map(read, stack)

    def start(self) -> Later:
        """No token has been visited: all zeros."""
        return Later(
            jnp.zeros_like(self.read.weights),
            jnp.zeros(self.read.queries.shape, self.values.dtype),
        )

    def __call__(
        self, token: Int[Array, ""], out_bar_BD: Float[Array, "B D"], later: Later
    ) -> tuple[Float[Array, "B D"], Later]:
        """The cotangent of the token's input, after all later tokens have been visited.

        Args:
          token: 0 … t − 1; each once, from the last to the first.
          out_bar_BD: the complete cotangent of its output.
        """
        at = self.first + token
        pick = lambda array, axis, start=token: jax.lax.dynamic_slice_in_dim(array, start, 1, axis)
        config, mask_and_rope = self.config, self.mask_and_rope.at_queries(at, 1)

        def back(carry, layer):
            out_bar_B1D, shared_bar = carry
            weights, x_B1D, own_input, products, own_read, keys, values, read, later, index = layer
            here, form = mask_and_rope.of(index), score_form(index, weights, config)
            attended = heads_last(mix_values(own_read.weights, values))
            finish = lambda x, attended, own_input: layer_output(
                x, attended, Products(weights, products), config, own_input
            )
            _, pull_output = jax.vjp(finish, x_B1D, attended, own_input)
            x_bar, attended_bar, own_bar = pull_output(out_bar_B1D)
            mixed_bar = heads_first(attended_bar, config.n_kv_heads)
            mix_bar = jnp.einsum(
                "bkgsx,bkcx->bkgsc", mixed_bar, values, preferred_element_type=jnp.float32
            )
            scores_bar = scores_cotangent(own_read.weights, mix_bar, own_read.slope) * form.scale
            query_bar = mix_values(scores_bar, keys)
            # This token's key and value, as later tokens and the token itself have used them.
            own = lambda array: pick(array, 4, at)[..., 0].astype(keys.dtype)
            collect = functools.partial(jnp.einsum, "bkgt,bkgtx->bkx")
            key_bar = collect(own(later.scores_bar), read.queries)
            key_bar += collect(own(scores_bar), own_read.queries)
            value_bar = collect(own(read.weights), later.mixed_bar)
            value_bar += collect(own(own_read.weights), mixed_bar)
            begin = lambda x, earlier: attention_inputs(
                x, Products(weights, products), here, index, config, earlier
            )
            own_bars = (key_bar[:, :, None], value_bar[:, :, None])
            earlier = None if shared_bar is None else jax.tree.map(jnp.zeros_like, own_bars)
            _, pull_inputs = jax.vjp(begin, x_B1D, earlier)
            if shared_bar is not None:
                own_bars = jax.tree.map(jnp.add, own_bars, of_window(shared_bar, index))
            inputs_bar, earlier_bar = pull_inputs((query_bar, *own_bars))
            shared_bar = with_window(shared_bar, index, earlier_bar)
            return (x_bar + inputs_bar, shared_bar), (Later(scores_bar, mixed_bar), own_bar)

        stack = (
            self.layers,
            pick(self.inputs, 2),
            jax.tree.map(lambda array: pick(array, 2), self.own_inputs),
            jax.tree.map(lambda array: pick(array, 2), self.products),
            jax.tree.map(lambda array: pick(array, 4), self.read),
            self.keys,
            self.values,
            self.read,
            later,
            self.index_N,
        )
        shared_bar = _no_cotangents(pick(self.keys, 3), pick(self.values, 3), config)
        (x_bar, _), (rows, own_bar) = jax.lax.scan(
            back,
            (out_bar_BD[:, None], shared_bar),
            stack,
            reverse=True,
            unroll=config.unroll or len(self.keys),
        )
        write = lambda all_rows, row: jax.lax.dynamic_update_slice_in_dim(all_rows, row, token, 4)
        return _joined(x_bar, own_bar, config)[:, 0], jax.tree.map(write, later, rows)
