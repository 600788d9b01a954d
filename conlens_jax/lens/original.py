"""M as the lens uses it: capture at the output of block L, and a swap at the cost of a decode step.

A swap is activation patching: another vector in the activation's place. It changes only positions
≥ P. So one pass over the context, without gradient, saves the residual stream after block L at
P..P+h−1, the true logits there, and the keys and values of the layers above L; a swap then runs h
positions through those layers alone. It equals the full forward pass (``LanguageModel.swap``) up to
rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.lens.spec import LensSpec
from conlens_jax.lens.vocabulary import ReferenceLogits
from conlens_jax.models import transformer
from conlens_jax.models.beside import Beside
from conlens_jax.models.cache import KVCache
from conlens_jax.models.layer_kinds import slice_layers
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer import (
    add_position_embeddings,
    all_positions,
    embed_tokens,
    head_of,
    positions_of,
    run_layers,
    run_part,
    unembed,
)


class Context(NamedTuple):
    """The part of a context that a swap at P needs; h is the horizon.

    Attributes:
      residual_BhD: residual stream at the output of block L, indices P..P+h−1.
      logits_BhV: the true logits there, fp32.
      positions_Bh: their rotary positions.
      cache: keys and values of the layers above L (None if L is the last).
      beside: what else these layers read there (None if nothing).
    """

    residual_BhD: Float[Array, "B h D"]
    logits_BhV: Float[Array, "B h V"]
    positions_Bh: Int[Array, "B h"]
    cache: KVCache | None
    beside: Beside | None


class ContextStates(NamedTuple):
    """One pass of M over G contexts: what swaps at any of their positions need.

    Attributes:
      residual_GSD: residual stream at the output of block L.
      state_GSD: residual stream at the output of the last block.
      positions_GS: rotary positions.
      cache: keys and values of the layers above L (None if L is the last).
      beside: what else these layers read (None if nothing).
    """

    residual_GSD: Float[Array, "G S D"]
    state_GSD: Float[Array, "G S D"]
    positions_GS: Int[Array, "G S"]
    cache: KVCache | None
    beside: Beside | None


def capture(
    original: Params,
    tokens_BS: Int[Array, "B S"],
    mask_BS: Bool[Array, "B S"],
    *,
    spec: LensSpec,
) -> Float[Array, "B S D"]:
    """The residual stream at the output of block L, all positions; stops there."""
    return transformer.capture(original, tokens_BS, mask_BS, config=spec.model, layer=spec.layer)


def capture_and_predict(
    original: Params,
    tokens_BS: Int[Array, "B S"],
    mask_BS: Bool[Array, "B S"],
    positions_Bk: Int[Array, "B k"],
    *,
    count: int,
    spec: LensSpec,
) -> tuple[Float[Array, "B k D"], Int[Array, "B k n"], Float[Array, "B k n"]]:
    """The residual stream at the output of block L and M's likeliest next tokens, at k positions
    of each sequence, from one pass.

    Args:
      positions_Bk: indices into the sequence.
      count: n, how many next tokens.

    Returns:
      Residual stream, ids and probabilities, the likeliest first.
    """
    layers = (spec.layer, spec.model.n_layers - 1)
    x_BlSD = transformer.capture(original, tokens_BS, mask_BS, config=spec.model, layer=layers)
    rows_B1 = jnp.arange(len(tokens_BS))[:, None]
    read_BkD, state_BkD = (x_BlSD[:, index][rows_B1, positions_Bk] for index in range(2))
    log_p_BkV = jax.nn.log_softmax(unembed(original, state_BkD, config=spec.model))
    log_p_Bkn, ids_Bkn = jax.lax.top_k(log_p_BkV, count)
    return read_BkD, ids_Bkn, jnp.exp(log_p_Bkn)


def documents_of(rows_B: Array, documents_G: Array) -> Int[Array, "B"]:
    """The document, of G, that each of B rows belongs to: B / G consecutive rows to each."""
    return jnp.arange(len(rows_B)) // (len(rows_B) // len(documents_G))


def read_context(
    original: Params,
    tokens_GS: Int[Array, "G S"],
    mask_GS: Bool[Array, "G S"],
    indices_B: Int[Array, "B"],
    *,
    horizon: int,
    spec: LensSpec,
) -> Context:
    """The contexts of B rows, from one pass over each of G sequences.

    Args:
      indices_B: P as an index into the sequence, for B / G consecutive rows per sequence;
        P + horizon − 1 must be inside it (``dump.after`` ensures that).
    """
    states = read_through(original, tokens_GS, mask_GS, spec=spec)
    documents_B = documents_of(indices_B, tokens_GS)
    cache = _repeat_cache(states.cache, len(indices_B) // len(tokens_GS))
    return _context(original, states, documents_B, indices_B, cache, horizon, spec)


def read_through(
    original: Params,
    tokens_GS: Int[Array, "G S"],
    mask_GS: Bool[Array, "G S"],
    *,
    spec: LensSpec,
) -> ContextStates:
    """One pass of M over whole contexts, for any number of :func:`context_at`."""
    config, layers = spec.model, original["layers"]
    positions_GS = positions_of(mask_GS)
    x_GSD = add_position_embeddings(
        original, embed_tokens(original, tokens_GS, config), positions_GS, config
    )
    lower = slice_layers(layers, 0, spec.layer + 1)
    lower_GSD, _, beside = run_part(lower, x_GSD, positions_GS, config=config)
    upper = slice_layers(layers, spec.layer + 1, config.n_layers)
    x_GSD, cache, _ = run_part(
        upper, lower_GSD, positions_GS, config=config, beside=beside, keep_cache=True
    )
    return ContextStates(lower_GSD, x_GSD, positions_GS, cache, beside)


def context_at(
    original: Params,
    states: ContextStates,
    documents_B: Int[Array, "B"],
    indices_B: Int[Array, "B"],
    *,
    horizon: int,
    spec: LensSpec,
) -> Context:
    """The context of each row, for any rows of the sequences that were read.

    Args:
      documents_B: the sequence, of G, that each row belongs to.
      indices_B: P, as for :func:`read_context`.
    """
    cache = states.cache
    if cache is not None:
        of_rows = lambda array: array[:, documents_B]
        positions_BS = cache.positions_BC[documents_B]
        cache = KVCache(of_rows(cache.keys), of_rows(cache.values), positions_BS)
    return _context(original, states, documents_B, indices_B, cache, horizon, spec)


def _context(original, states, documents_B, indices_B, cache, horizon, spec) -> Context:
    window_Bh = indices_B[:, None] + jnp.arange(horizon, dtype=jnp.int32)[None]
    documents_B1 = documents_B[:, None]
    state_BhD = states.state_GSD[documents_B1, window_Bh]
    return Context(
        residual_BhD=states.residual_GSD[documents_B1, window_Bh],
        logits_BhV=unembed(original, state_BhD, config=spec.model),
        positions_Bh=states.positions_GS[documents_B1, window_Bh],
        cache=cache,
        beside=states.beside and states.beside.at_rows(documents_B, window_Bh),
    )


def repeat_context(context: Context, count: int) -> Context:
    """Each row ``count`` times in succession, without another pass over its context."""
    if count == 1:
        return context
    repeat = lambda array, axis=0: jnp.repeat(array, count, axis=axis)
    return Context(
        residual_BhD=repeat(context.residual_BhD),
        logits_BhV=repeat(context.logits_BhV),
        positions_Bh=repeat(context.positions_Bh),
        cache=_repeat_cache(context.cache, count),
        beside=jax.tree.map(lambda array: repeat(array, 1), context.beside),
    )


def _repeat_cache(cache: KVCache | None, count: int) -> KVCache | None:
    if cache is None or count == 1:
        return cache
    rows = lambda array, axis: jnp.repeat(array, count, axis=axis)
    return KVCache(rows(cache.keys, 1), rows(cache.values, 1), rows(cache.positions_BC, 0))


def swapped_logits(
    original: Params,
    context: Context,
    activation_BD: Float[Array, "B D"],
    *,
    spec: LensSpec,
) -> Float[Array, "B h V"]:
    """M's logits at P..P+h−1 with ``activation_BD`` as the output of block L at P; fp32,
    differentiable in the activation."""
    residual_BhD = context.residual_BhD.at[:, 0].set(
        activation_BD.astype(context.residual_BhD.dtype)
    )
    upper = slice_layers(original["layers"], spec.layer + 1, spec.model.n_layers)
    x_BhD, _, _ = run_part(
        upper,
        residual_BhD,
        context.positions_Bh,
        config=spec.model,
        beside=context.beside,
        cache=context.cache,
    )
    return unembed(original, x_BhD, config=spec.model)


def text_alone(
    original: Params, text_BT: Int[Array, "B T"], start: tuple[int, ...], spec: LensSpec
) -> ReferenceLogits:
    """M's predictions of each token of a text, given the tokens ``start`` before it.

    With an empty ``start`` the first token is predicted from nothing: its logits are uniform.
    """
    prefix = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (text_BT.shape[0], len(start)))
    tokens = jnp.concatenate([prefix, text_BT[:, :-1]], axis=1)
    positions = all_positions(*tokens.shape)
    x = embed_tokens(original, tokens, spec.model)
    x = add_position_embeddings(original, x, positions, spec.model)
    x, _ = run_layers(original["layers"], x, positions, config=spec.model)
    state_BTD = x[:, len(start) - 1 :] if start else jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
    return ReferenceLogits(head_of(original, spec.model), state_BTD)
