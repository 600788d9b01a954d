"""E, the encoder: text → activation. A clone of M, cut behind block L."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conlens_jax.lens.spec import Encoder, LensSpec, around, denormalise, normalise, project
from conlens_jax.models.transformer import all_positions, embed_tokens, enter, run_layers


def encode_embeddings(
    encoder: Encoder, text_BTD: Float[Array, "B T D"], *, spec: LensSpec
) -> Float[Array, "B D"]:
    """The reconstruction â, fp32, in the units of the activation.

    Args:
      text_BTD: embeddings of the text in the encoder's own table, as
        :func:`~conlens_jax.models.transformer.embed_tokens` gives them (straight-through ones,
        where gradient is to reach the decoder).
    """
    return _reconstruct(encoder, _states(encoder, _prompted(encoder, text_BTD, spec), spec)[:, -1])


def encode_prefixes(
    encoder: Encoder, text_BTD: Float[Array, "B T D"], *, spec: LensSpec
) -> Float[Array, "B T D"]:
    """The reconstruction from the first 1, 2, … T tokens: E is causal, so one pass has them all.

    Entry T − 1 is that of :func:`encode_embeddings`.

    Raises:
      ValueError: the encoder's prompt has a part behind the text; then E reads behind that part,
        and a prefix is not read on its way.
    """
    if spec.encoder_right:
        raise ValueError("prefixes can be read only where lens.encoder_prompt ends with <text>")
    states_BnD = _states(encoder, _prompted(encoder, text_BTD, spec), spec)
    return _reconstruct(encoder, states_BnD[:, len(spec.encoder_left) :])


def encode_ragged(
    encoder: Encoder, text_BTD: Float[Array, "B T D"], lengths_B: Int[Array, "B"], *, spec: LensSpec
) -> Float[Array, "B D"]:
    """The reconstruction from the first ``lengths_B`` tokens of each text, 1 to T of them; one
    program for every length."""
    n_left, text_len = len(spec.encoder_left), text_BTD.shape[1]
    x_BnD = _prompted(encoder, text_BTD, spec)
    rows_B, places_n = jnp.arange(x_BnD.shape[0]), jnp.arange(x_BnD.shape[1])
    # The prompt's right side moves up to the end of the text. E is causal: what stands behind it
    # is not seen.
    ends_B1 = n_left + lengths_B[:, None]
    moved_Bn = jnp.where(places_n >= ends_B1, places_n - ends_B1 + n_left + text_len, places_n)
    x_BnD = x_BnD[rows_B[:, None], jnp.minimum(moved_Bn, x_BnD.shape[1] - 1)]
    last_B = ends_B1[:, 0] + len(spec.encoder_right) - 1
    return _reconstruct(encoder, _states(encoder, x_BnD, spec)[rows_B, last_B])


def _prompted(encoder: Encoder, text_BTD: Array, spec: LensSpec) -> Float[Array, "B n D"]:
    return around(encoder.prompt_pD, text_BTD, len(spec.encoder_left))


def _states(encoder: Encoder, x: Float[Array, "B n D"], spec: LensSpec) -> Float[Array, "B n D"]:
    positions = all_positions(*x.shape[:2])
    x = enter(encoder.base, x, positions)
    x, _ = run_layers(encoder.base["layers"], x, positions, config=spec.model)
    return x


def _reconstruct(encoder: Encoder, state: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    # The state lives where activations live, so an untrained projection hands it on unchanged.
    state = normalise(state, encoder.statistics)
    return denormalise(project(state, encoder.projection), encoder.statistics)


def encode_tokens(
    encoder: Encoder, tokens_BT: Int[Array, "B T"], *, spec: LensSpec
) -> Float[Array, "B D"]:
    """The reconstruction from given text."""
    return encode_embeddings(encoder, embed_tokens(encoder.base, tokens_BT, spec.model), spec=spec)
