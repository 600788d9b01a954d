"""The transformer: tokens to a residual stream, blocks scanned over stacked parameters, logits.

Everything here is a pure function; :mod:`conlens_jax.models.flax_module` is the same transformer
as a Flax module. Which keys a query sees follows from positions alone: the key's position must not
be after the query's (nor too far before it, if the layer has a window), and unused slots have
:data:`NO_POSITION`.

There are three kinds of input. :func:`embed_tokens` returns a token's embedding, scaled if the
model scales it; Hugging Face calls this ``inputs_embeds`` (Granite's are unscaled), and a vector
that replaces a token is of this kind. :func:`add_position_embeddings` turns embeddings into the
residual stream at the input of the first layer: it adds learned position embeddings, if the model
has them.
:func:`run_layers` takes the residual stream at the input of the layers that it runs.

A part of the layers that does not begin with the first must be told what is beside the residual
stream there, in models where something is (:mod:`conlens_jax.models.beside`): :func:`run_part`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.models.beside import Beside, apart, inputs_of, of_window, with_window
from conlens_jax.models.block import Besides, Residuals, run_block
from conlens_jax.models.cache import KVCache, append
from conlens_jax.models.embeddings import add_position_embeddings, embed_tokens
from conlens_jax.models.experts import PRODUCT_NAME
from conlens_jax.models.layer_kinds import (
    NO_POSITION,
    Layers,
    layer_count,
    mask_and_rope_of,
    scanned,
    slice_layers,
    span_of,
)
from conlens_jax.models.norms import apply_norm
from conlens_jax.models.param_table import Params
from conlens_jax.models.quantized import Matrix, matmul
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.parallel.constrain import constrain


class Patches(NamedTuple):
    """Vectors added to the residual stream at the input of each of n layers, at index ``at`` of the
    sequence."""

    vectors: Float[Array, "n B D"]
    at: Int[Array, ""]


# What the head has besides its matrix.
HEAD_ROWS = ("final_norm", "final_norm_bias", "output_head_bias")
# What ``model.remat`` saves of a layer for the backward pass; "none" saves everything.
REMAT_POLICIES = {
    "full": None,
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT_NAME),
    ),
}


def run_layers(
    layers: Layers,
    x_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    *,
    config: TransformerConfig,
    cache: KVCache | None = None,
    slot: Int[Array, ""] | Int[Array, " B"] | None = None,
    keep_cache: bool = False,
    patches: Patches | None = None,
) -> tuple[Float[Array, "B S D"], KVCache | None]:
    """Runs the residual stream through a stack of layers.

    Args:
      layers: the n layers to run: the model's stacked parameters, or a part of them from
        :func:`slice_layers`.
      x_BSD: residual stream at the input of the first of them.
      positions_BS: position of each token; :data:`NO_POSITION` for padding.
      cache: keys and values of earlier tokens. The new tokens see those at positions before
        their own first; later ones in the cache are masked.
      slot: where in the cache the new tokens' keys and values are written.
      keep_cache: return the new keys and values if no cache is given.
      patches: added to the residual stream at the input of each layer.

    Returns:
      The residual stream at the output of the last layer, and the cache (None if there is none;
      unchanged if no slot is given).
    """
    x_BSD, cache, _ = run_part(
        layers,
        x_BSD,
        positions_BS,
        config=config,
        cache=cache,
        slot=slot,
        keep_cache=keep_cache,
        patches=patches,
    )
    return x_BSD, cache


def run_part(
    layers: Layers,
    x_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    *,
    config: TransformerConfig,
    beside: Beside | None = None,
    cache: KVCache | None = None,
    slot: Int[Array, ""] | Int[Array, " B"] | None = None,
    keep_cache: bool = False,
    patches: Patches | None = None,
) -> tuple[Float[Array, "B S D"], KVCache | None, Beside | None]:
    """:func:`run_layers` for layers after which others are run.

    Args:
      beside: of the layers before these; None if these begin with the model's first.

    Returns:
      Also what is beside the residual stream after them.
    """
    if beside is None:
        x_BSD, beside = apart(layers, x_BSD, config)
    if layer_count(layers) == 0:
        return x_BSD, cache, beside
    x_BSD, made, beside = scan_layers(layers, x_BSD, positions_BS, config, cache, patches, beside)
    if cache is not None and slot is not None:
        cache = append(cache, made.keys, made.values, positions_BS, slot)
    elif keep_cache:
        cache = KVCache(made.keys, made.values, positions_BS)
    return x_BSD, cache, beside


def checkpointed(block: Callable, config: TransformerConfig, transform=jax.checkpoint) -> Callable:
    """A block that recomputes in the backward pass what ``config.remat`` says.

    Args:
      transform: ``jax.checkpoint``, or its form for Flax modules.
    """
    if config.remat not in REMAT_POLICIES:
        return block
    return transform(block, prevent_cse=False, policy=REMAT_POLICIES[config.remat])


def scan_layers(
    layers: Layers,
    x_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    config: TransformerConfig,
    cache: KVCache | None = None,
    patches: Patches | None = None,
    beside: Beside | None = None,
) -> tuple[Float[Array, "B S D"], Residuals, Beside | None]:
    n_layers = layer_count(layers)
    past = None if cache is None else (cache.keys, cache.values)
    past_positions_BC = None if cache is None else cache.positions_BC
    patch_NBD, patch_at = (None, None) if patches is None else patches
    mask_and_rope, index_N = mask_and_rope_of(
        span_of(layers), positions_BS, past_positions_BC, config
    )
    elements, weights_of = scanned(layers)

    # The weights are taken inside of it: where layers are recomputed, they are taken again, since
    # saved they would be a copy of the stack.
    def run(element, *inputs):
        return run_block(weights_of(element), *inputs, config=config)

    block = checkpointed(run, config)

    def body(carry, layer):
        x_BSD, newest = carry
        element, past, patch_BD, index, input_BSI = layer
        besides = Besides(input_BSI, of_window(newest, index))
        x_BSD, made = block(
            element, x_BSD, past, patch_BD, None, index, mask_and_rope, patch_at, besides
        )
        return (x_BSD, with_window(newest, index, (made.keys, made.values))), made

    newest = None if beside is None or beside.keys is None else (beside.keys, beside.values)
    stack = (elements, past, patch_NBD, index_N, inputs_of(layers, beside))
    unroll = config.unroll or n_layers
    (x_BSD, newest), made = jax.lax.scan(
        body, (constrain(x_BSD, "BSD"), newest), stack, unroll=unroll
    )
    if newest is not None:
        beside = beside._replace(keys=newest[0], values=newest[1])
    return constrain(x_BSD, "BSD"), made, beside


def positions_of(mask_BS: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Positions 0, 1, … of the valid tokens of each row, wherever the padding is."""
    counted = jnp.cumsum(mask_BS, axis=-1, dtype=jnp.int32) - 1
    return jnp.where(mask_BS, counted, NO_POSITION)


def all_positions(batch: int, length: int) -> Int[Array, "B S"]:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def output_head(params: Params) -> Matrix:
    """The matrix from the normed residual stream to logits; the transposed embedding if tied."""
    head = params.get("output_head")
    return params["embedding"].T if head is None else head


@flax.struct.dataclass
class Head:
    """From the state after the last layer to logits.

    Attributes:
      rows: the rows ``final_norm``, ``final_norm_bias`` (of a layer norm) and
        ``output_head_bias`` of the table, those that the model has.
    """

    rows: Params
    matrix_DV: Matrix
    config: TransformerConfig = flax.struct.field(pytree_node=False)

    @property
    def vocab_size(self) -> int:
        return self.matrix_DV.shape[1]

    def logits(self, state: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """fp32."""
        normed = apply_norm(state, self.rows, "final_norm", self.config)
        logits = matmul(normed, self.matrix_DV).astype(jnp.float32)
        if "output_head_bias" in self.rows:
            bias_V = self.rows["output_head_bias"].astype(jnp.float32)
            logits = logits + jax.lax.broadcast_to_rank(bias_V, logits.ndim)
        if logits.ndim > 1:
            logits = constrain(logits, "B" + "T" * (logits.ndim - 2) + "V")
        if self.config.logit_divisor != 1:
            logits = logits / self.config.logit_divisor
        cap = self.config.final_soft_cap
        return cap * jnp.tanh(logits / cap) if cap else logits


def head_of(params: Params, config: TransformerConfig, matrix_DV: Matrix | None = None) -> Head:
    """The model's head, or its norm and bias with another matrix."""
    rows = {name: params[name] for name in HEAD_ROWS if name in params}
    return Head(rows, output_head(params) if matrix_DV is None else matrix_DV, config)


def unembed(
    params: Params, x: Float[Array, "*B D"], *, config: TransformerConfig
) -> Float[Array, "*B V"]:
    """Final norm and output head; logits in fp32."""
    return head_of(params, config).logits(x)


def forward(
    params: Params,
    tokens_BS: Int[Array, "B S"],
    *,
    config: TransformerConfig,
    mask_BS: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B S V"]:
    """Logits of whole sequences: the plain path that everything faster is tested against."""
    positions_BS = all_positions(*tokens_BS.shape) if mask_BS is None else positions_of(mask_BS)
    x_BSD = embed_tokens(params, tokens_BS, config)
    x_BSD = add_position_embeddings(params, x_BSD, positions_BS, config)
    x_BSD, _ = run_layers(params["layers"], x_BSD, positions_BS, config=config)
    return unembed(params, x_BSD, config=config)


def capture(
    params: Params,
    tokens_BS: Int[Array, "B S"],
    mask_BS: Bool[Array, "B S"],
    *,
    config: TransformerConfig,
    layer: int | Sequence[int],
) -> Float[Array, "B S D"] | Float[Array, "B n S D"]:
    """The residual stream at the output of block ``layer`` (−1: at the input of block 0), at every
    position; of several layers, [B, n, S, D]. No block after the last of them is run."""
    wanted = (layer,) if isinstance(layer, int) else layer
    positions_BS = positions_of(mask_BS)
    x_BSD = embed_tokens(params, tokens_BS, config)
    x_BSD = add_position_embeddings(params, x_BSD, positions_BS, config)
    captured, start, beside = {}, 0, None
    for last in sorted(set(wanted)):
        layers = slice_layers(params["layers"], start, last + 1)
        x_BSD, _, beside = run_part(layers, x_BSD, positions_BS, config=config, beside=beside)
        captured[last], start = x_BSD, last + 1
    if isinstance(layer, int):
        return captured[layer]
    return jnp.stack([captured[last] for last in wanted], axis=1)
