"""The decoder: activation → text. A clone of M with the activation in its prompt.

Sample first, differentiate second. :func:`generate` writes the text with a key-value cache and
without a gradient. One parallel pass over ``[prompt, activation, text]`` then recomputes the states
that the tokens were sampled from: :func:`forced_states` with its plain gradient, where the text is
a constant, and :func:`~conlens_jax.lens.history.text_states` with the gradient through the sampled
text.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conlens_jax.lens.gumbel import Noise, as_noise, first_argmax
from conlens_jax.lens.losses import cross_entropy
from conlens_jax.lens.spec import Decoder, LensSpec, around, normalise, project
from conlens_jax.models import transformer
from conlens_jax.models.cache import KVCache, with_room, write_slots
from conlens_jax.models.embeddings import as_embedding
from conlens_jax.models.transformer import (
    Head,
    Patches,
    add_position_embeddings,
    all_positions,
    embed_tokens,
    run_layers,
)
from conlens_jax.parallel.constrain import constrain


def decoder_head(decoder: Decoder, spec: LensSpec) -> Head:
    """The final norm of the base with the decoder's output head."""
    return transformer.head_of(decoder.base, spec.model, decoder.head_DV)


def prompt_embeddings(
    decoder: Decoder, activation_BD: Float[Array, "B D"], spec: LensSpec
) -> Float[Array, "B p D"]:
    """``left <embed> right`` with the projected activation at ``<embed>``."""
    slot_BD = project(normalise(activation_BD, decoder.statistics), decoder.projection)
    slot_BD = as_embedding(decoder.base, slot_BD, spec.model)
    return around(decoder.prompt_pD, slot_BD[:, None], len(spec.decoder_left))


def slot_patches(
    decoder: Decoder, activation_BD: Float[Array, "B D"], spec: LensSpec
) -> Patches | None:
    """What is added to the activation's slot at the inputs of layers 1, 2, …: one projection of
    the activation per layer.

    The other layers get zeros: one scan over all layers reads the stacked weights in place, two
    scans over parts of them would copy them.
    """
    if decoder.input_patches is None:
        return None
    kernel, bias = decoder.input_patches["kernel"], decoder.input_patches["bias"]
    kernel = constrain(kernel, "nDD")  # as in project
    normal_BD = normalise(activation_BD, decoder.statistics).astype(kernel.dtype)
    patch_nBD = jnp.einsum("bd,nde->nbe", normal_BD, kernel) + bias[:, None]
    unpatched = spec.model.n_layers - 1 - len(bias)
    patch_NBD = jnp.pad(patch_nBD, ((1, unpatched), (0, 0), (0, 0)))
    return Patches(patch_NBD, jnp.int32(len(spec.decoder_left)))


class DecodingState(NamedTuple):
    """The decoding state: the newest token, and the keys and values of all before it."""

    token_B: Int[Array, "B"]
    cache: KVCache


def generate(
    decoder: Decoder,
    activation_BD: Float[Array, "B D"],
    noise: Noise | Float[Array, "B T V"] | None,
    *,
    spec: LensSpec,
) -> Int[Array, "B T"]:
    """Writes T tokens: argmax(logits + noise), greedy if ``noise`` is None. After an end token
    (:mod:`~conlens_jax.lens.text`) all are end tokens.

    Not differentiable; the gradient comes from :func:`~conlens_jax.lens.history.text_states`.
    """
    noise = None if noise is None else as_noise(noise)

    def write_next(state, step):
        state = next_token(decoder, state, step, noise, spec=spec)
        return state, state.token_B

    first = first_token(decoder, activation_BD, noise, spec=spec)
    steps = jnp.arange(1, spec.text_len, dtype=jnp.int32)
    _, rest_TB = jax.lax.scan(write_next, first, steps)
    return jnp.concatenate([first.token_B[:, None], rest_TB.T], axis=1)


def write_texts(
    decoder: Decoder, activation_BD: Float[Array, "B D"], noise: Noise | None, *, spec: LensSpec
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The texts of :func:`generate`, to be read rather than learned from: it stops when all have
    ended, and also returns the decoder's log p of each token (nats; 0 after the end)."""
    last, end = spec.text_len - 1, spec.end
    state, logits_BV = _first(decoder, activation_BD, noise, spec)
    fill = functools.partial(jnp.full, (len(activation_BD), spec.text_len))
    put = functools.partial(write_slots, axis=1)
    log_p = lambda token_B, logits_BV: -cross_entropy(logits_BV, token_B)[:, None]

    def goes_on(carry):
        step, state, _, _ = carry
        return (step <= last) & (True if end is None else jnp.any(state.token_B != end))

    def write_next(carry):
        step, before, text_BT, log_p_BT = carry
        state, logits_BV = _next(decoder, before, step, noise, spec)
        log_p_B1 = log_p(state.token_B, logits_BV)
        if end is not None:
            log_p_B1 = jnp.where(before.token_B[:, None] == end, 0.0, log_p_B1)
        text_BT = put(text_BT, state.token_B[:, None], step)
        return step + 1, state, text_BT, put(log_p_BT, log_p_B1, step)

    start = jnp.int32(0)
    text_BT = put(fill(end or 0, jnp.int32), state.token_B[:, None], start)
    log_p_BT = put(fill(0.0, jnp.float32), log_p(state.token_B, logits_BV), start)
    carry = (jnp.int32(1), state, text_BT, log_p_BT)
    return jax.lax.while_loop(goes_on, write_next, carry)[2:]


def first_token(
    decoder: Decoder,
    activation_BD: Float[Array, "B D"],
    noise: Noise | None,
    *,
    spec: LensSpec,
) -> DecodingState:
    """Reads the prompt with the activation and writes token 0; the cache has room for all T."""
    return _first(decoder, activation_BD, noise, spec)[0]


def _first(
    decoder: Decoder, activation_BD: Array, noise: Noise | None, spec: LensSpec
) -> tuple[DecodingState, Float[Array, "B V"]]:
    """The state, and the logits that the token was chosen from."""
    prompt_BpD = prompt_embeddings(decoder, activation_BD, spec)
    positions_Bp = all_positions(*prompt_BpD.shape[:2])
    x_BpD, cache = run_layers(
        decoder.base["layers"],
        add_position_embeddings(decoder.base, prompt_BpD, positions_Bp, spec.model),
        positions_Bp,
        config=spec.model,
        keep_cache=True,
        patches=slot_patches(decoder, activation_BD, spec),
    )
    token_B, logits_BV = _choose(decoder, x_BpD[:, -1], jnp.int32(0), noise, spec)
    return DecodingState(token_B, with_room(cache, spec.text_len - 1)), logits_BV


def next_token(
    decoder: Decoder,
    state: DecodingState,
    step: Int[Array, ""],
    noise: Noise | None,
    *,
    spec: LensSpec,
) -> DecodingState:
    """Writes token ``step``, 1 to T − 1."""
    return _next(decoder, state, step, noise, spec)[0]


def _next(
    decoder: Decoder, state: DecodingState, step: Array, noise: Noise | None, spec: LensSpec
) -> tuple[DecodingState, Float[Array, "B V"]]:
    prompt_len = len(spec.decoder_left) + 1 + len(spec.decoder_right)
    slot = prompt_len + step - 1
    position_B1 = jnp.broadcast_to(slot, (len(state.token_B), 1))
    embedding_B1D = embed_tokens(decoder.base, state.token_B, spec.model)[:, None]
    x_B1D, cache = run_layers(
        decoder.base["layers"],
        add_position_embeddings(decoder.base, embedding_B1D, position_B1, spec.model),
        position_B1,
        config=spec.model,
        cache=state.cache,
        slot=slot,
    )
    token_B, logits_BV = _choose(decoder, x_B1D[:, 0], step, noise, spec)
    if spec.end is not None:
        token_B = jnp.where(state.token_B == spec.end, spec.end, token_B)
    return DecodingState(token_B, cache), logits_BV


def _choose(
    decoder: Decoder, x_BD: Array, step: Array, noise: Noise | None, spec: LensSpec
) -> tuple[Int[Array, "B"], Float[Array, "B V"]]:
    head = decoder_head(decoder, spec)
    logits_BV = head.logits(x_BD)
    if noise is None:
        return first_argmax(logits_BV), logits_BV
    return first_argmax(logits_BV + noise.at(step).values(head.vocab_size)[:, 0]), logits_BV


def forced_states(
    decoder: Decoder,
    activation_BD: Float[Array, "B D"],
    history_BtD: Float[Array, "B T-1 D"],
    *,
    spec: LensSpec,
) -> Float[Array, "B T D"]:
    """The states after the last layer that the T tokens are sampled from, given the embeddings of
    the first T − 1; one parallel pass."""
    prompt_BpD = prompt_embeddings(decoder, activation_BD, spec)
    x = jnp.concatenate([prompt_BpD, history_BtD.astype(prompt_BpD.dtype)], axis=1)
    positions = all_positions(*x.shape[:2])
    x, _ = run_layers(
        decoder.base["layers"],
        add_position_embeddings(decoder.base, x, positions, spec.model),
        positions,
        config=spec.model,
        patches=slot_patches(decoder, activation_BD, spec),
    )
    return x[:, prompt_BpD.shape[1] - 1 :]


def teacher_forced_states(
    decoder: Decoder,
    activation_BD: Float[Array, "B D"],
    tokens_BT: Int[Array, "B T"],
    *,
    spec: LensSpec,
) -> Float[Array, "B T D"]:
    """The states of a given text, with the plain gradient: the text is a constant."""
    history_BtD = embed_tokens(decoder.base, tokens_BT[:, :-1], spec.model)
    return forced_states(decoder, activation_BD, history_BtD, spec=spec)
