"""Input patches against layers that are run one by one, with the vector added in between."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import (
    BATCH,
    TEXT_LEN,
    plain_prompt,
    relative_error,
    teacher_forced_logits,
    text_logits,
    tiny_batch,
    tiny_lens,
    tiny_noise,
    tiny_original,
    tiny_spec,
)
from tiny_models import random_tokens, write_tokenizer

from conlens_jax.config import LensConfig, OptimizerConfig
from conlens_jax.lens.decoder import generate
from conlens_jax.lens.spec import decoder_of, init_lens, make_spec
from conlens_jax.models.layer_kinds import slice_layers
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.transformer import all_positions, run_layers, unembed
from conlens_jax.training.optimizer import decay_mask, learning_rate_multipliers

SPEC = tiny_spec(train_decoder="frozen", input_patches=2)
SLOT = 3  # behind the three tokens left of the activation


@functools.cache
def lens():
    return tiny_lens(SPEC)


def given():
    activation_BD = tiny_batch(SPEC, lens()[1]["original"]).activation_BD
    return activation_BD, jnp.asarray(random_tokens(BATCH, TEXT_LEN))


def plain_logits(decoder, frozen, activation_BD, text_BT):
    """Layer by layer; the layers 1 and 2 of three have a patch."""
    trainable, original = {"decoder": decoder}, frozen["original"]
    statistics, patches = frozen["statistics"], decoder["input_patches"]
    normal_BD = (activation_BD - statistics["mean"][None]) / statistics["scale"]
    prompt_BpD = plain_prompt(trainable, frozen, activation_BD, SPEC)
    x = jnp.concatenate([prompt_BpD, original["embedding"][text_BT[:, :-1]]], axis=1)
    for layer in range(3):
        if layer:
            vector = normal_BD @ patches["kernel"][layer - 1] + patches["bias"][layer - 1, None]
            x = x.at[:, SLOT].add(vector)
        one = slice_layers(original["layers"], layer, layer + 1)
        x, _ = run_layers(one, x, all_positions(*x.shape[:2]), config=SPEC.model)
    x = x[:, prompt_BpD.shape[1] - 1 :]
    return unembed(original, x, config=SPEC.model)


def our_logits(decoder, frozen, activation_BD, text_BT, spec=SPEC):
    parts = decoder_of({"decoder": decoder}, frozen)
    return teacher_forced_logits(parts, activation_BD, text_BT, spec=spec)


def test_patches_start_with_no_effect():
    without = tiny_spec(train_decoder="frozen")
    start = [
        init_lens(tiny_original(spec), spec, np.linspace(-1, 1, 32), 0.5)
        for spec in (SPEC, without)
    ]
    assert start[0][0]["decoder"]["input_patches"]["kernel"].shape == (2, 32, 32)
    assert "input_patches" not in start[1][0]["decoder"]
    found = [
        jax.jit(functools.partial(our_logits, spec=spec))(trainable["decoder"], frozen, *given())
        for (trainable, frozen), spec in zip(start, (SPEC, without), strict=True)
    ]
    np.testing.assert_array_equal(*found)


def test_logits_and_gradient_are_those_of_the_plain_layers():
    trainable, frozen = lens()
    cotangent = np.random.default_rng(5).standard_normal((BATCH, TEXT_LEN, 48)).astype(np.float32)

    def pulled(logits_of):
        def run(decoder, frozen, activation_BD, text_BT):
            of = lambda decoder, activation: logits_of(decoder, frozen, activation, text_BT)
            logits, pull = jax.vjp(of, decoder, activation_BD)
            return logits, pull(cotangent)

        return jax.jit(run)(trainable["decoder"], frozen, *given())

    (logits, gradient), (expected, expected_gradient) = pulled(our_logits), pulled(plain_logits)
    assert relative_error(logits, expected) < 1e-5
    assert relative_error(gradient, expected_gradient) < 1e-5
    unpatched = {name: x for name, x in trainable["decoder"].items() if name != "input_patches"}
    plain = jax.jit(our_logits)(unpatched, frozen, *given())
    assert relative_error(plain, expected) > 0.01


def test_text_is_sampled_from_the_same_logits_and_differentiated():
    trainable, frozen = lens()
    activation_BD, _ = given()
    noise_BTV, tau = tiny_noise(), jnp.float32(1.0)
    write = jax.jit(functools.partial(generate, spec=SPEC))
    text_BT = write(decoder_of(trainable, frozen), activation_BD, noise_BTV)

    def loss(decoder, frozen):
        parts = decoder_of({"decoder": decoder}, frozen)
        logits = text_logits(parts, activation_BD, text_BT, noise_BTV, tau, SPEC)
        return jnp.sum(logits**2), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(trainable["decoder"], frozen)
    np.testing.assert_array_equal(np.argmax(logits + noise_BTV, axis=-1), text_BT)
    assert all(np.all(jnp.any(leaf != 0, axis=-1)) for leaf in jax.tree.leaves(gradient))


def test_optimizer_knows_them():
    trainable, _ = lens()
    found = learning_rate_multipliers(OptimizerConfig(patch_multiplier=5.0), trainable)
    assert found["decoder"]["input_patches"] == {"kernel": 5.0, "bias": 5.0}
    assert decay_mask(trainable)["decoder"]["input_patches"] == {"kernel": True, "bias": False}


def test_more_patches_than_layers_are_refused(tmp_path):
    write_tokenizer(tmp_path, 48)
    tokenizer = Tokenizer.from_folder(tmp_path)
    fields = {"decoder_prompt": "<embed>", "encoder_prompt": "<text>"}
    make_spec(SPEC.model, 1, LensConfig(input_patches=2, **fields), tokenizer)
    with pytest.raises(ValueError, match="lens.input_patches=3 must be at most 2"):
        make_spec(SPEC.model, 1, LensConfig(input_patches=3, **fields), tokenizer)
