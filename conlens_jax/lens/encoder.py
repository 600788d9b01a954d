"""E, the encoder: text → activation. A clone of M, cut behind block L."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.lens.spec import Encoder, LensSpec, around, denormalise, normalise, project
from conlens_jax.models.transformer import (
    add_position_embeddings,
    all_positions,
    embed_tokens,
    positions_of,
    run_layers,
)


def encode_embeddings(
    encoder: Encoder,
    text_BTD: Float[Array, "B T D"],
    *,
    spec: LensSpec,
    mask_BT: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B D"]:
    """The reconstruction â, fp32, in the units of the activation.

    Args:
      text_BTD: embeddings of the text in the encoder's own table, as
        :func:`~conlens_jax.models.transformer.embed_tokens` gives them (straight-through ones,
        where gradient is to reach the decoder).
      mask_BT: False on padding, which stands on the left of the text; None: there is none.
    """
    return _reconstruct(encoder, _states(encoder, text_BTD, spec, mask_BT)[:, -1])


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
    return _reconstruct(encoder, _states(encoder, text_BTD, spec)[:, len(spec.encoder_left) :])


def encode_ragged(
    encoder: Encoder, text_BTD: Float[Array, "B T D"], lengths_B: Int[Array, "B"], *, spec: LensSpec
) -> Float[Array, "B D"]:
    """The reconstruction from the first ``lengths_B`` tokens of each text, 1 to T of them; one
    program for every length."""
    text_len = text_BTD.shape[1]
    # Pushed to the right, so that what is not read becomes padding on the left.
    places_BT = jnp.arange(text_len) - (text_len - lengths_B[:, None])
    pushed_BTD = jnp.take_along_axis(text_BTD, jnp.maximum(places_BT, 0)[..., None], axis=1)
    return encode_embeddings(encoder, pushed_BTD, spec=spec, mask_BT=places_BT >= 0)


def _states(
    encoder: Encoder,
    text_BTD: Array,
    spec: LensSpec,
    mask_BT: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B n D"]:
    x = around(encoder.prompt_pD, text_BTD, len(spec.encoder_left))
    if mask_BT is None:
        positions = all_positions(*x.shape[:2])
    else:
        sides = ((0, 0), (len(spec.encoder_left), len(spec.encoder_right)))
        positions = positions_of(jnp.pad(mask_BT, sides, constant_values=True))
    x = add_position_embeddings(encoder.base, x, positions)
    x, _ = run_layers(encoder.base["layers"], x, positions, config=spec.model)
    return x


def _reconstruct(encoder: Encoder, state: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    # The state lives where activations live, so an untrained projection hands it on unchanged.
    state = normalise(state, encoder.statistics)
    return denormalise(project(state, encoder.projection), encoder.statistics)


def encode_tokens(
    encoder: Encoder,
    tokens_BT: Int[Array, "B T"],
    *,
    spec: LensSpec,
    mask_BT: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B D"]:
    """The reconstruction from given text; ``mask_BT`` as for :func:`encode_embeddings`."""
    text_BTD = embed_tokens(encoder.base, tokens_BT, spec.model)
    return encode_embeddings(encoder, text_BTD, spec=spec, mask_BT=mask_BT)
