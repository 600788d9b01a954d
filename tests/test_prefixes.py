"""E reads every prefix of a text in one pass, and a loss on all of them."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import TEXT_LEN, tiny_batch, tiny_lens, tiny_spec
from tiny_models import random_tokens

from conlens_jax.config import LossConfig, WarmConfig
from conlens_jax.lens.encoder import (
    encode_embeddings,
    encode_prefixes,
    encode_ragged,
    encode_tokens,
)
from conlens_jax.lens.losses import reconstruction_error
from conlens_jax.lens.objective import Objective, source_window, warm_loss
from conlens_jax.lens.spec import encoder_of
from conlens_jax.measurement.aggregates import doublings
from conlens_jax.models.transformer import embed_tokens


@functools.cache
def case():
    spec = dataclasses.replace(tiny_spec(), encoder_right=())
    trainable, frozen = tiny_lens(spec)
    return spec, trainable, frozen


def test_each_prefix_reads_as_if_the_text_ended_there():
    spec, trainable, frozen = case()
    encoder = encoder_of(trainable, frozen, spec)
    text = random_tokens(3, TEXT_LEN)
    prefixes = encode_prefixes(encoder, embed_tokens(encoder.base, text, spec.model), spec=spec)
    for k in range(1, TEXT_LEN + 1):
        alone = encode_tokens(encoder, text[:, :k], spec=spec)
        np.testing.assert_allclose(prefixes[:, k - 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("right", [(), (9, 10)])
def test_texts_of_unequal_length_read_as_each_alone(right):
    """With a prompt behind the text as well; what stands behind a text is not seen."""
    spec = dataclasses.replace(tiny_spec(), encoder_right=right)
    trainable, frozen = tiny_lens(spec)
    encoder = encoder_of(trainable, frozen, spec)
    text = random_tokens(TEXT_LEN, TEXT_LEN)
    lengths = jnp.arange(TEXT_LEN, dtype=jnp.int32)[::-1] + 1
    text_BTD = embed_tokens(encoder.base, text, spec.model)
    found = encode_ragged(encoder, text_BTD, lengths, spec=spec)
    for row, length in enumerate(lengths.tolist()):
        alone = encode_tokens(encoder, text[row : row + 1, :length], spec=spec)
        np.testing.assert_allclose(found[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_prompt_behind_the_text_is_refused():
    spec = tiny_spec()
    trainable, frozen = tiny_lens(spec)
    encoder = encoder_of(trainable, frozen, spec)
    text_BTD = jnp.zeros((1, TEXT_LEN, spec.model.d_model))
    with pytest.raises(ValueError, match=r"ends with <text>"):
        encode_prefixes(encoder, text_BTD, spec=spec)
    assert encode_embeddings(encoder, text_BTD, spec=spec).shape == (1, spec.model.d_model)


def test_prefix_share_mixes_the_mean_error_of_shorter_texts():
    spec, trainable, frozen = case()
    batch = tiny_batch(spec, frozen["original"])
    warm = WarmConfig(before=3, after=1)
    encoder_error = {}
    for share in (0.0, 0.5):
        objective = Objective(LossConfig(prefix_share=share), warm, spec)
        _, terms = warm_loss(trainable, frozen, batch, objective=objective)
        encoder_error[share] = float(terms["encoder_error"])
    window = source_window(batch.tokens_GS, batch.positions_B, 3, 1)
    encoder = encoder_of(trainable, frozen, spec)
    errors = [
        float(
            jnp.mean(
                reconstruction_error(
                    encode_tokens(encoder, window[:, :k], spec=spec),
                    batch.activation_BD,
                    frozen["statistics"],
                    "direction+norm",
                )
            )
        )
        for k in range(1, TEXT_LEN + 1)
    ]
    assert encoder_error[0.0] == pytest.approx(errors[-1], rel=1e-5)
    mixed = 0.5 * errors[-1] + 0.5 * np.mean(errors[:-1])
    assert encoder_error[0.5] == pytest.approx(mixed, rel=1e-5)
    assert abs(mixed - errors[-1]) > 1e-3 * errors[-1]


@pytest.mark.parametrize(
    ("text_len", "expected"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])]
)
def test_doublings(text_len, expected):
    assert doublings(text_len) == expected
