"""The jitted functions of a lens: contexts, texts, reconstructions and swaps, per row.

A row is a position of a document, with one text to write for it. A document is read once for any
number of its rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from conlens_jax.config.seeds import random_key
from conlens_jax.lens import decoder as lens_decoder
from conlens_jax.lens.decoder import DecodingState, decoder_head, teacher_forced_states
from conlens_jax.lens.encoder import encode_tokens
from conlens_jax.lens.gumbel import Noise, Purpose, drawn_noise
from conlens_jax.lens.losses import direction_error, kl_divergence
from conlens_jax.lens.original import ContextStates, context_at, read_through, swapped_logits
from conlens_jax.lens.spec import LensSpec, decoder_of, encoder_of
from conlens_jax.measurement.programs import text_log_probs
from conlens_jax.models.param_table import Params

TOP = 5
"""Number of M's most probable tokens that are reported."""
MOST_ALTERNATIVES = 32
"""Of the decoder, at each place of a text."""


class SwapPrediction(NamedTuple):
    """M's next-token predictions at the position of each row, without and with a vector swapped in.

    Attributes:
      cos: of the vector and the activation.
      norm: of the activation.
      kl: KL(M ‖ M with the swap), nats.
      kl_mean: with the mean training activation instead; None without statistics.
      before, after: the most probable tokens [B, TOP] and their probabilities.
    """

    cos: Float[Array, "B"]
    norm: Float[Array, "B"]
    kl: Float[Array, "B"]
    kl_mean: Float[Array, "B"] | None
    before: tuple[Int[Array, "B k"], Float[Array, "B k"]]
    after: tuple[Int[Array, "B k"], Float[Array, "B k"]]


class Sampling(NamedTuple):
    """How texts are sampled: a key for each row, and the decoder's temperature."""

    keys_B: Key[Array, "B"]
    temperature: Float[Array, ""]


def sampling_of(
    seed: int, positions_B: Array, samples_B: Array, temperature: float = 1.0
) -> Sampling:
    """One key per row from (seed, position, sample): a text gets the same samples alone or in a
    list."""
    key = jax.random.fold_in(random_key(seed), int(Purpose.EXPLANATION))
    fold = lambda p, s: jax.random.fold_in(jax.random.fold_in(key, p), s)
    return Sampling(jax.vmap(fold)(positions_B, samples_B), jnp.float32(temperature))


class Programs:
    """Jitted functions for one lens shape; they recompile for every shape of their arguments.

    Writing and reading texts, which take the longest to compile, see nothing of a document but
    activations: its length is only that of :attr:`read`, :attr:`activations` and :attr:`swap`.
    """

    def __init__(self, spec: LensSpec):
        bound = lambda function: jax.jit(functools.partial(function, spec=spec))
        self.read = bound(read_through)
        self.activations = jax.jit(_activations)
        self.reconstruct = bound(_reconstruct)
        self.text_log_probs = bound(text_log_probs)
        self.alternatives = bound(_alternatives)
        self.swap = bound(_swap)
        self.encode = bound(_encode)
        self.write = bound(_write)
        self.first_token = bound(_first_token)
        self.next_token = jax.jit(functools.partial(_next_token, spec=spec), donate_argnums=2)


def _noise(sampling: Sampling | None, spec: LensSpec) -> Noise | None:
    """The argmax of logits + t·noise is that of logits / t + noise: a draw at temperature t."""
    if sampling is None:
        return None
    return drawn_noise(sampling.keys_B, spec.text_len, sampling.temperature)


def _activations(
    states: ContextStates,
    documents_B: Int[Array, "B"],
    indices_B: Int[Array, "B"],
) -> Float[Array, "B D"]:
    return states.residual_GSD[documents_B, indices_B].astype(jnp.float32)


def _alternatives(
    trainable: Params,
    frozen: Params,
    activation_1D: Float[Array, "1 D"],
    text_1T: Int[Array, "1 T"],
    *,
    spec: LensSpec,
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """The decoder's likeliest tokens at each place of a text, and their probabilities."""
    decoder = decoder_of(trainable, frozen)
    states_1TD = teacher_forced_states(decoder, activation_1D, text_1T, spec=spec)
    probabilities_TV = jax.nn.softmax(decoder_head(decoder, spec).logits(states_1TD[0]))
    most = min(MOST_ALTERNATIVES, probabilities_TV.shape[-1])
    values_Tk, tokens_Tk = jax.lax.top_k(probabilities_TV, most)
    return tokens_Tk, values_Tk


def _swap(
    frozen: Params,
    states: ContextStates,
    documents_B: Int[Array, "B"],
    indices_B: Int[Array, "B"],
    vector_BD: Float[Array, "B D"],
    *,
    spec: LensSpec,
) -> SwapPrediction:
    original = frozen["original"]
    context = context_at(original, states, documents_B, indices_B, horizon=1, spec=spec)
    swapped_BhV = swapped_logits(original, context, vector_BD, spec=spec)
    activation_BD = context.residual_BhD[:, 0].astype(jnp.float32)
    kl_mean = None
    if "statistics" in frozen:
        mean_BD = jnp.broadcast_to(frozen["statistics"]["mean"], vector_BD.shape)
        with_mean_BhV = swapped_logits(original, context, mean_BD, spec=spec)
        kl_mean = kl_divergence(context.logits_BhV, with_mean_BhV)[:, 0]
    return SwapPrediction(
        cos=1 - direction_error(vector_BD, activation_BD) / 2,
        norm=jnp.linalg.norm(activation_BD, axis=-1),
        kl=kl_divergence(context.logits_BhV, swapped_BhV)[:, 0],
        kl_mean=kl_mean,
        before=_most_probable(context.logits_BhV[:, 0]),
        after=_most_probable(swapped_BhV[:, 0]),
    )


def _most_probable(logits_BV: Float[Array, "B V"]) -> tuple[Array, Array]:
    probabilities, tokens = jax.lax.top_k(jax.nn.softmax(logits_BV), TOP)
    return tokens, probabilities


def _reconstruct(trainable, frozen, text_BT, *, spec: LensSpec) -> Float[Array, "B D"]:
    """The encoder's reading of texts that the decoder wrote."""
    return encode_tokens(encoder_of(trainable, frozen, spec), text_BT, spec=spec)


def _encode(
    trainable: Params,
    frozen: Params,
    tokens_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    spec: LensSpec,
) -> Float[Array, "B D"]:
    encoder = encoder_of(trainable, frozen, spec)
    return encode_tokens(encoder, tokens_BT, spec=spec, mask_BT=mask_BT)


def _write(
    trainable, frozen, activation_BD, sampling, *, spec: LensSpec
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Texts, and the decoder's log p of their tokens."""
    decoder = decoder_of(trainable, frozen)
    return lens_decoder.write_texts(decoder, activation_BD, _noise(sampling, spec), spec=spec)


def _first_token(trainable, frozen, activation_BD, sampling, *, spec: LensSpec) -> DecodingState:
    decoder = decoder_of(trainable, frozen)
    return lens_decoder.first_token(decoder, activation_BD, _noise(sampling, spec), spec=spec)


def _next_token(trainable, frozen, state, step, sampling, *, spec: LensSpec) -> DecodingState:
    decoder = decoder_of(trainable, frozen)
    return lens_decoder.next_token(decoder, state, step, _noise(sampling, spec), spec=spec)
