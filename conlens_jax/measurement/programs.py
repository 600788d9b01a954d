"""What is measured on one batch: pure functions of arrays, for ``jit``.

:class:`~conlens_jax.measurement.runner.Measurer` compiles them and runs them over rows.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conlens_jax.lens.batch import Batch
from conlens_jax.lens.decoder import decoder_head, generate, teacher_forced_states
from conlens_jax.lens.encoder import encode_prefixes, encode_ragged, encode_tokens
from conlens_jax.lens.gumbel import Purpose, drawn_noise, example_keys
from conlens_jax.lens.losses import cross_entropy, direction_error, kl_divergence
from conlens_jax.lens.original import (
    Context,
    capture,
    read_context,
    swapped_logits,
    text_alone,
)
from conlens_jax.lens.spec import LensSpec, decoder_of, encoder_of
from conlens_jax.lens.text import last_real, real_tokens, sum_of_text, take_places
from conlens_jax.lens.vocabulary import text_terms
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer import embed_tokens, unembed

TOP = 5


class SwapEffect(NamedTuple):
    """What M predicts at P with a vector swapped in, one entry per row.

    Attributes:
      kl_at: KL(M ‖ M with the swap) at P, nats.
      kl_cont: its mean over P..P+h−1.
      ce: −log p of the true next token, nats.
      top_tokens, top_probabilities: [N, TOP], most likely first.
    """

    kl_at: np.ndarray
    kl_cont: np.ndarray
    ce: np.ndarray
    top_tokens: np.ndarray
    top_probabilities: np.ndarray


def explain(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    noise_scale: jax.Array,
    draw: jax.Array,
    *,
    spec: LensSpec,
    seed: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Texts [B, T], reconstructions [B, D], and their cosines by prefix [B, T] (or [B, 0])."""
    decoder, encoder = decoder_of(trainable, frozen), encoder_of(trainable, frozen, spec)
    keys_B = example_keys(seed, draw, batch.examples_B, Purpose.MEASURED_TEXT)
    noise = drawn_noise(keys_B, spec.text_len, noise_scale)
    text_BT = generate(decoder, batch.activation_BD, noise, spec=spec)
    real_BT = real_tokens(text_BT, spec.end)
    if spec.encoder_right:
        no_prefixes = jnp.zeros((text_BT.shape[0], 0), jnp.float32)
        return text_BT, encode_tokens(encoder, text_BT, spec=spec), no_prefixes
    prefixes_BTD = encode_prefixes(
        encoder, embed_tokens(encoder.base, text_BT, spec.model), spec=spec
    )
    cos_BT = 1 - direction_error(prefixes_BTD, batch.activation_BD[:, None]) / 2
    if real_BT is None:
        return text_BT, prefixes_BTD[:, -1], cos_BT
    last_B = last_real(real_BT)
    whole_B1 = take_places(cos_BT, last_B)[:, None]
    return text_BT, take_places(prefixes_BTD, last_B), jnp.where(real_BT, cos_BT, whole_B1)


def read_text(
    trainable: Params, frozen: Params, text_BT: jax.Array, lengths_B: jax.Array, *, spec: LensSpec
) -> jax.Array:
    encoder = encoder_of(trainable, frozen, spec)
    text_BTD = embed_tokens(encoder.base, text_BT, spec.model)
    real_BT = real_tokens(text_BT, spec.end)
    if real_BT is not None:
        lengths_B = jnp.minimum(lengths_B, last_real(real_BT) + 1)
    return encode_ragged(encoder, text_BTD, lengths_B, spec=spec)


def text_nll(original: Params, text_BT: jax.Array, *, spec: LensSpec):
    start = () if spec.bos is None else (spec.bos,)
    alone = text_alone(original, text_BT, start, spec)
    nll_BT = text_terms(alone.head, alone.state_BTD, text_BT)["nll"]
    real_BT = real_tokens(text_BT, spec.end)
    if real_BT is None:
        return jnp.mean(nll_BT, axis=-1)
    # M never ends where an explanation does: its end token does not count.
    words_BT = real_BT & (text_BT != spec.end)
    count_B = jnp.maximum(jnp.sum(words_BT, axis=1, dtype=jnp.float32), 1.0)
    return sum_of_text(nll_BT, words_BT) / count_B


def text_log_probs(
    trainable: Params,
    frozen: Params,
    activation_BD: jax.Array,
    text_BT: jax.Array,
    *,
    spec: LensSpec,
) -> jax.Array:
    """The decoder's log p of each token of a given text, given the activation and the tokens before
    it; [B, T], nats."""
    decoder = decoder_of(trainable, frozen)
    states_BTD = teacher_forced_states(decoder, activation_BD, text_BT, spec=spec)
    return -text_terms(decoder_head(decoder, spec), states_BTD, text_BT)["nll"]


def context_of_batch(
    original: Params, batch: Batch, *, spec: LensSpec, horizon: int
) -> tuple[Context, jax.Array, SwapEffect]:
    """The context of a batch, the true next tokens, and M's predictions without a swap."""
    context = read_context(
        original, batch.tokens_GS, batch.mask_GS, batch.positions_B, horizon=horizon, spec=spec
    )
    rows_B = jnp.arange(batch.tokens_GS.shape[0])
    next_token_B = batch.tokens_GS[rows_B, batch.positions_B + 1]
    return context, next_token_B, _describe(context, next_token_B, context.logits_BhV)


def effect_of_swap(
    original: Params,
    context: Context,
    next_token_B: jax.Array,
    vector_BD: jax.Array,
    *,
    spec: LensSpec,
) -> SwapEffect:
    logits_BhV = swapped_logits(original, context, vector_BD, spec=spec)
    return _describe(context, next_token_B, logits_BhV)


def odds_of_pair(
    original: Params,
    context: Context,
    vector_BD: jax.Array,
    pairs_B2: jax.Array,
    *,
    spec: LensSpec,
) -> jax.Array:
    logits_BhV = swapped_logits(original, context, vector_BD, spec=spec)
    of_pair_Bh2 = jnp.take_along_axis(logits_BhV, pairs_B2[:, None], axis=-1)
    return of_pair_Bh2[..., 1] - of_pair_Bh2[..., 0]


def unembedded(
    original: Params,
    context: Context,
    next_token_B: jax.Array,
    state_BD: jax.Array,
    *,
    spec: LensSpec,
) -> tuple[SwapEffect, jax.Array]:
    state_B1D = state_BD[:, None].astype(original["embedding"].dtype)
    logits_B1V = unembed(original, state_B1D, config=spec.model)
    words_BT = jax.lax.top_k(logits_B1V[:, 0], spec.text_len)[1]
    return _describe(context, next_token_B, logits_B1V), words_BT


def states_at(original: Params, batch: Batch, *, layer: int, spec: LensSpec) -> jax.Array:
    """The residual stream at the output of block ``layer``, position P; fp32 [B, D]."""
    here = dataclasses.replace(spec, layer=layer)
    states_BSD = capture(original, batch.tokens_GS, batch.mask_GS, spec=here)
    return states_BSD[jnp.arange(len(states_BSD)), batch.positions_B].astype(jnp.float32)


def _describe(context: Context, next_token_B: jax.Array, logits_BhV: jax.Array) -> SwapEffect:
    kl_Bh = kl_divergence(context.logits_BhV[:, : logits_BhV.shape[1]], logits_BhV)
    top_probabilities, top_tokens = jax.lax.top_k(jax.nn.softmax(logits_BhV[:, 0]), TOP)
    return SwapEffect(
        kl_at=kl_Bh[:, 0],
        kl_cont=jnp.mean(kl_Bh, axis=1),
        ce=cross_entropy(logits_BhV[:, 0], next_token_B),
        top_tokens=top_tokens,
        top_probabilities=top_probabilities,
    )
