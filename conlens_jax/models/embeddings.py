"""Tokens to embeddings, and embeddings to the input of the first layer.

In a model whose layers have inputs of their own (Gemma 4), a token's embedding is ``d_embedding``
wide: after the D numbers of the residual stream come those of its row in a second table, I for each
layer. All that is done with embeddings (a sampled token's gradient, a soft prompt) is so done with
both. :func:`add_position_embeddings` makes the layers' inputs of them, and
:func:`~conlens_jax.models.transformer.run_layers` takes them apart.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conlens_jax.models.layer_kinds import NO_POSITION
from conlens_jax.models.norms import apply_norm
from conlens_jax.models.param_table import Params
from conlens_jax.models.quantized import (
    JoinedTable,
    Matrix,
    matmul,
    split_frozen,
    take_rows,
    zeros_bar,
)
from conlens_jax.models.transformer_config import TransformerConfig

# What makes the layers' own inputs: the second table, and from the embedding to all of them.
LAYER_INPUT_ROWS = ("layer_embedding", "layer_input_projection", "layer_input_norm")


def embed_tokens(
    params: Params, tokens: Int[Array, "*B"], config: TransformerConfig
) -> Float[Array, "*B D"]:
    """Also their part for the layers' own inputs, if the model has these."""
    return scale_embeddings(take_rows(token_table(params), tokens), config)


def token_table(params: Params) -> Matrix | JoinedTable:
    """The table of embeddings, with the second one beside it if there is one."""
    if "layer_embedding" not in params:
        return params["embedding"]
    return JoinedTable((params["embedding"], params["layer_embedding"]))


def scale_embeddings(rows: Float[Array, "*B D"], config: TransformerConfig) -> Float[Array, "*B D"]:
    """Rows of the embedding table (or cotangents of embeddings) times the model's factor; rows of
    both tables, each with its own."""
    if config.embedding_scale == 1:
        return rows
    factor = jnp.asarray(config.embedding_scale, rows.dtype)
    if config.d_layer_input and rows.shape[-1:] == (config.d_embedding,):
        more = jnp.asarray(math.sqrt(config.d_layer_input), rows.dtype)
        is_first = jnp.arange(config.d_embedding) < config.d_model
        factor = jax.lax.broadcast_to_rank(jnp.where(is_first, factor, more), rows.ndim)
    return rows * factor


def as_embedding(
    params: Params, vectors: Float[Array, "*B D"], config: TransformerConfig
) -> Float[Array, "*B E"]:
    """Vectors that are no token's as embeddings: their layers' own inputs are made with those of
    ``layer_input_pad``, as transformers has it for the places of an image."""
    if not config.d_layer_input:
        return vectors
    pad = embed_tokens(params, jnp.int32(config.layer_input_pad), config)[config.d_model :]
    pad = jnp.broadcast_to(pad.astype(vectors.dtype), (*vectors.shape[:-1], *pad.shape))
    return jnp.concatenate([vectors, pad], axis=-1)


def add_position_embeddings(
    params: Params,
    embeddings_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    config: TransformerConfig,
) -> Float[Array, "B S D"]:
    """The residual stream at the input of the first layer: embeddings, and the vectors of their
    positions if the model has learned ones. Positions beyond its table give NaN.

    After it come the layers' own inputs, if they have any (:func:`_layer_inputs`)."""
    if config.d_layer_input:
        return _layer_inputs(params, embeddings_BSD, config)
    if "position_embedding" not in params:
        return embeddings_BSD
    rows_BS = jnp.where(positions_BS == NO_POSITION, 0, positions_BS) + config.position_offset
    vectors_BSD = jnp.take(params["position_embedding"], rows_BS, axis=0)
    return embeddings_BSD + vectors_BSD.astype(embeddings_BSD.dtype)


def _layer_inputs(
    params: Params, embeddings_BSE: Float[Array, "B S E"], config: TransformerConfig
) -> Float[Array, "B S E"]:
    """e, the first D numbers of the embedding; then for each layer (norm(Pe / √D) + own) / √2, own
    being the layer's I numbers in the embedding."""
    if embeddings_BSE.shape[-1] != config.d_embedding:
        raise ValueError(
            f"embeddings are {embeddings_BSE.shape[-1]} wide, not {config.d_embedding}: those of "
            "this model contain the inputs of its layers (as_embedding adds them to vectors)"
        )
    e_BSD, own_BSL = jnp.split(embeddings_BSE, [config.d_model], axis=-1)
    made_BSL = matmul(e_BSD, params["layer_input_projection"])
    made_BSL = _times(made_BSL, config.d_model**-0.5)
    each = (*made_BSL.shape[:-1], config.n_layers, config.d_layer_input)
    normal = apply_norm(made_BSL.reshape(each), params, "layer_input_norm", config)
    inputs_BSL = _times(normal.reshape(made_BSL.shape) + own_BSL, 2.0**-0.5)
    return jnp.concatenate([e_BSD, inputs_BSL], axis=-1)


def _times(x: Float[Array, "..."], factor: float) -> Float[Array, "..."]:
    """Rounded once, as in transformers."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def embeddings_vjp(
    params: Params,
    embeddings_BSE: Float[Array, "B S E"],
    x_bar_BSE: Float[Array, "B S E"],
    config: TransformerConfig,
) -> tuple[Params, Float[Array, "B S E"]]:
    """From cotangents of :func:`add_position_embeddings`' result to those of the rows that make
    the layers' own inputs (none in a model without) and of the embeddings."""
    if not config.d_layer_input:
        return {}, x_bar_BSE
    _, *makes_inputs = LAYER_INPUT_ROWS
    trained, frozen = split_frozen({name: params[name] for name in makes_inputs})
    run = lambda trained, embeddings: _layer_inputs({**trained, **frozen}, embeddings, config)
    _, pull = jax.vjp(run, trained, embeddings_BSE)
    rows_bar, embeddings_bar_BSE = pull(x_bar_BSE.astype(embeddings_BSE.dtype))
    return {**rows_bar, **zeros_bar(frozen)}, embeddings_bar_BSE
