"""E, the encoder: text → activation. A clone of M, cut behind block L."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from conlens_jax.lens.spec import Encoder, LensSpec, around, denormalise, normalise, project
from conlens_jax.models.transformer import all_positions, embed_tokens, run_layers


def encode_embeddings(
    encoder: Encoder, text_BTD: Float[Array, "B T D"], *, spec: LensSpec
) -> Float[Array, "B D"]:
    """The reconstruction â, fp32, in the units of the activation.

    Args:
      text_BTD: embeddings of the text in the encoder's own table (straight-through ones, where
        gradient is to reach the decoder).
    """
    x = around(encoder.prompt_pD, text_BTD, len(spec.encoder_left))
    x, _ = run_layers(encoder.base["layers"], x, all_positions(*x.shape[:2]), config=spec.model)
    # The state lives where activations live, so an untrained projection hands it on unchanged.
    state_BD = normalise(x[:, -1], encoder.statistics)
    return denormalise(project(state_BD, encoder.projection), encoder.statistics)


def encode_tokens(
    encoder: Encoder, tokens_BT: Int[Array, "B T"], *, spec: LensSpec
) -> Float[Array, "B D"]:
    """The reconstruction from given text."""
    return encode_embeddings(encoder, embed_tokens(encoder.base, tokens_BT), spec=spec)
