"""The encoder: text → activation. A clone of M, cut after block L."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.lens.spec import Encoder, LensSpec, around, denormalise, normalise, project
from conlens_jax.lens.text import last_real, real_tokens, take_places
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
    last_B: Int[Array, "B"] | None = None,
) -> Float[Array, "B D"]:
    """The reconstruction â, fp32, in the units of the activation.

    Args:
      text_BTD: embeddings of the text in the encoder's own table, as
        :func:`~conlens_jax.models.transformer.embed_tokens` returns them (straight-through
        embeddings, if the gradient is to reach the decoder).
      mask_BT: False on padding, which is on the left of the text; None: no padding.
      last_B: the last real token of each text; what follows it is not read. None: the last of all.
    """
    if last_B is None:
        return _reconstruct(encoder, _states(encoder, text_BTD, spec, mask_BT)[:, -1])
    if spec.encoder_right:
        return encode_ragged(encoder, text_BTD, last_B + 1, spec=spec)
    states_BSD = _states(encoder, text_BTD, spec, mask_BT)
    return _reconstruct(encoder, take_places(states_BSD, len(spec.encoder_left) + last_B))


def encode_prefixes(
    encoder: Encoder, text_BTD: Float[Array, "B T D"], *, spec: LensSpec
) -> Float[Array, "B T D"]:
    """The reconstructions from the first 1, 2, … T tokens: the encoder is causal, so one pass
    gives all of them.

    Entry T − 1 is that of :func:`encode_embeddings`.

    Raises:
      ValueError: the encoder's prompt has a part after the text; then the reconstruction is read
        after that part, and one pass does not give those of the prefixes.
    """
    if spec.encoder_right:
        raise ValueError("prefixes can be read only where lens.encoder_prompt ends with <text>")
    return _reconstruct(encoder, _states(encoder, text_BTD, spec)[:, len(spec.encoder_left) :])


def encode_ragged(
    encoder: Encoder, text_BTD: Float[Array, "B T D"], lengths_B: Int[Array, "B"], *, spec: LensSpec
) -> Float[Array, "B D"]:
    """The reconstruction from the first ``lengths_B`` tokens of each text, 1 to T; one compiled
    program for all lengths."""
    text_len = text_BTD.shape[1]
    # Aligned to the right: padding is on the left.
    source_BT = jnp.arange(text_len)[None] - (text_len - lengths_B[:, None])
    aligned_BTD = jnp.take_along_axis(text_BTD, jnp.maximum(source_BT, 0)[..., None], axis=1)
    return encode_embeddings(encoder, aligned_BTD, spec=spec, mask_BT=source_BT >= 0)


def _states(
    encoder: Encoder,
    text_BTD: Array,
    spec: LensSpec,
    mask_BT: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B S D"]:
    x = around(encoder.prompt_pD, text_BTD, len(spec.encoder_left))
    if mask_BT is None:
        positions = all_positions(*x.shape[:2])
    else:
        sides = ((0, 0), (len(spec.encoder_left), len(spec.encoder_right)))
        positions = positions_of(jnp.pad(mask_BT, sides, constant_values=True))
    x = add_position_embeddings(encoder.base, x, positions, spec.model)
    x, _ = run_layers(encoder.base["layers"], x, positions, config=spec.model)
    return x


def _reconstruct(encoder: Encoder, state: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    # States and activations share their coordinates: the untrained projection is the identity.
    state = normalise(state, encoder.statistics)
    return denormalise(project(state, encoder.projection), encoder.statistics)


def encode_tokens(
    encoder: Encoder,
    tokens_BT: Int[Array, "B T"],
    *,
    spec: LensSpec,
    mask_BT: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B D"]:
    """The reconstruction from given text, up to its end token; ``mask_BT`` as for
    :func:`encode_embeddings`, of texts without an end token."""
    text_BTD = embed_tokens(encoder.base, tokens_BT, spec.model)
    real_BT = None if mask_BT is not None else real_tokens(tokens_BT, spec.end)
    last_B = None if real_BT is None else last_real(real_BT)
    return encode_embeddings(encoder, text_BTD, spec=spec, mask_BT=mask_BT, last_B=last_B)
