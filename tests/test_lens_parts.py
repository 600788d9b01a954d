"""What a lens is made of: which parts are trained, where the others live, where prompts go."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import (
    TEXT_LEN,
    captured,
    plain_reconstruction,
    tiny_batch,
    tiny_lens,
    tiny_noise,
    tiny_original,
    tiny_spec,
)
from tiny_models import random_tokens, write_tokenizer

from conlens_jax.config import LensConfig, LossConfig, WarmConfig, constant
from conlens_jax.lens.decoder import prompt_embeddings
from conlens_jax.lens.encoder import encode_embeddings, encode_tokens
from conlens_jax.lens.objective import TERMS, Objective, joint_loss, prepare
from conlens_jax.lens.spec import (
    decoder_of,
    denormalise,
    encoder_of,
    init_lens,
    make_spec,
    normalise,
)
from conlens_jax.models.layer_kinds import params_of
from conlens_jax.models.tokenizer import Tokenizer

SWITCHES = ("train_projections", "train_soft_prompt", "train_output_head")
COMBINATIONS = list(
    itertools.product(("full", "frozen"), ("full", "frozen"), *[(True, False)] * len(SWITCHES))
)


def untrained(spec):
    mean_D = np.linspace(-1, 1, spec.model.d_model)
    return init_lens(tiny_original(spec), spec, mean_D, 0.5)


def buffers(tree) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


# --- which parts there are ----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_parts_asked_for_are_trainable(tied):
    for decoder, encoder, *switches in COMBINATIONS:
        options = dict(zip(SWITCHES, switches, strict=True))
        spec = tiny_spec(tied=tied, train_decoder=decoder, train_encoder=encoder, **options)
        trainable, frozen = untrained(spec)
        both = {"projection": "train_projections", "soft_prompt": "train_soft_prompt"}
        common = {name for name, switch in both.items() if options[switch]}
        own_head = options["train_output_head"] and (decoder == "frozen" or tied)
        expected = {
            "decoder": common
            | ({"base"} if decoder == "full" else set())
            | ({"output_head"} if own_head else set()),
            "encoder": common | ({"base"} if encoder == "full" else set()),
        }
        assert {side: set(parts) for side, parts in trainable.items()} == expected
        for side in ("decoder", "encoder"):
            assert set(frozen[side]) == {"projection", "soft_prompt"} - common
        # A full decoder of an untied model trains its head as a part of the base.
        if decoder == "full":
            assert ("output_head" in trainable["decoder"]["base"]) == (not tied)


def test_frozen_weights_are_the_original_arrays_and_trained_ones_are_not():
    for decoder, encoder in itertools.product(("full", "frozen"), repeat=2):
        spec = tiny_spec(train_decoder=decoder, train_encoder=encoder, train_output_head=True)
        original = tiny_original(spec)
        trainable, frozen = init_lens(original, spec, np.zeros(32), 1.0)
        assert frozen["original"] is original
        assert not buffers(trainable) & buffers(original)  # the optimizer may overwrite these
        parts = decoder_of(trainable, frozen)
        assert (parts.base is original) == (decoder == "frozen")
        reader = encoder_of(trainable, frozen, spec)
        shared = reader.base["embedding"] is original["embedding"]
        assert shared == (encoder == "frozen")


def test_encoder_is_cut_behind_the_layer():
    for layer, train in itertools.product(range(3), ("full", "frozen")):
        spec = tiny_spec(layer=layer, train_encoder=train)
        trainable, frozen = untrained(spec)
        base = encoder_of(trainable, frozen, spec).base
        assert set(base) == {"embedding", "layers"}
        for name, stacked in frozen["original"]["layers"].items():
            np.testing.assert_array_equal(params_of(base["layers"])[name], stacked[: layer + 1])


def test_untrained_parts_are_those_of_the_original():
    for tied in (False, True):
        spec = tiny_spec(tied=tied, train_output_head=True)
        trainable, frozen = untrained(spec)
        original = frozen["original"]
        parts = decoder_of(trainable, frozen)
        jax.tree.map(np.testing.assert_array_equal, parts.base, original)
        head = original["embedding"].T if tied else original["output_head"]
        np.testing.assert_array_equal(parts.head_DV, head)
        for tokens, prompt in (
            (spec.decoder_left + spec.decoder_right, parts.prompt_pD),
            (spec.encoder_left + spec.encoder_right, encoder_of(trainable, frozen, spec).prompt_pD),
        ):
            np.testing.assert_array_equal(prompt, np.asarray(original["embedding"])[list(tokens)])


# --- gradients ----------------------------------------------------------------------------------

EVERYTHING = LossConfig(**{name: constant(1.0) for name in TERMS}, lm_reference="text")


@functools.partial(jax.jit, static_argnames="objective")
def joint_gradient(trainable, frozen, batch, noise_BTV, weights, *, objective):
    prepared = prepare(trainable, frozen, batch, noise_BTV, objective=objective)
    loss = lambda trainable: joint_loss(
        trainable, frozen, batch, prepared, weights, jnp.float32(1.0), objective=objective
    )[0]
    return jax.grad(loss)(trainable)


def test_gradient_reaches_every_trained_part():
    """Each term by itself: the KL through M, E and D; what is about D's text alone only D."""
    spec = tiny_spec(tied=True, train_encoder="frozen", train_output_head=True)
    spec = dataclasses.replace(spec, end=17)  # for a length
    trainable, frozen = tiny_lens(spec)
    batch = tiny_batch(spec, frozen["original"])
    objective = Objective(EVERYTHING, WarmConfig(before=3, after=1), spec)
    for term in TERMS:
        weights = {name: jnp.float32(name == term) for name in TERMS}
        gradient = joint_gradient(
            trainable, frozen, batch, tiny_noise(), weights, objective=objective
        )
        assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
        largest = jax.tree.map(lambda leaf: float(jnp.max(jnp.abs(leaf))), gradient)
        assert min(jax.tree.leaves(largest["decoder"])) > 1e-7, (term, largest)
        reached = jax.tree.leaves(largest["encoder"])
        if term in ("lm", "entropy", "length"):
            assert max(reached) == 0, term
        else:
            assert min(reached) > 1e-7, (term, largest)


# --- what the parts do --------------------------------------------------------------------------


def test_normalise_and_back():
    statistics = {"mean": jnp.linspace(-3, 3, 32), "scale": jnp.float32(0.2)}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 32)), jnp.float32)
    np.testing.assert_allclose(denormalise(normalise(x, statistics), statistics), x, atol=1e-6)
    np.testing.assert_allclose(normalise(statistics["mean"], statistics), np.zeros(32))
    one_away = statistics["mean"] + 0.2
    np.testing.assert_allclose(normalise(one_away, statistics), np.ones(32), rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 2])
def test_untrained_reconstruction_is_the_state_of_the_model(layer):
    """The identity initialisation: M's own residual stream behind prompt and text."""
    spec = tiny_spec(layer=layer, train_encoder="frozen")
    trainable, frozen = untrained(spec)
    text_BT = random_tokens(5, TEXT_LEN)
    read = jax.jit(functools.partial(encode_tokens, spec=spec))
    found = read(encoder_of(trainable, frozen, spec), jnp.asarray(text_BT))
    ends = [np.tile(ids, (5, 1)) for ids in (spec.encoder_left, spec.encoder_right)]
    tokens = np.concatenate([ends[0], text_BT, ends[1]], axis=1).astype(np.int32)
    states = captured(frozen["original"], tokens, np.ones(tokens.shape, bool), spec=spec)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, states[:, -1], rtol=0, atol=2e-5)


def test_trained_reconstruction_goes_through_projection_and_statistics():
    spec = tiny_spec()
    trainable, frozen = tiny_lens(spec)
    text_BTD = jnp.asarray(np.random.default_rng(1).standard_normal((5, TEXT_LEN, 32)), jnp.float32)
    encode = functools.partial(encode_embeddings, spec=spec)
    found = jax.jit(encode)(encoder_of(trainable, frozen, spec), text_BTD)
    plain = jax.jit(functools.partial(plain_reconstruction, spec=spec))
    np.testing.assert_allclose(found, plain(trainable, frozen, text_BTD), rtol=0, atol=2e-5)


def test_activation_stands_between_the_two_sides_of_the_prompt():
    spec = tiny_spec()
    trainable, frozen = tiny_lens(spec)
    activation_BD = tiny_batch(spec, frozen["original"]).activation_BD
    found = prompt_embeddings(decoder_of(trainable, frozen), activation_BD, spec)
    vectors = np.asarray(trainable["decoder"]["soft_prompt"])
    projection, statistics = trainable["decoder"]["projection"], frozen["statistics"]
    normal = (np.asarray(activation_BD) - statistics["mean"][None]) / statistics["scale"]
    slot = normal @ projection["kernel"] + projection["bias"][None]
    assert found.shape[1] == 5
    for place, expected in enumerate([*vectors[:3], slot, *vectors[3:]]):
        expected = np.broadcast_to(expected, slot.shape)
        np.testing.assert_allclose(found[:, place], expected, atol=1e-5)


def test_untrained_slot_is_as_large_as_an_embedding():
    spec = tiny_spec()
    trainable, frozen = untrained(spec)
    rng = np.random.default_rng(2)
    statistics = frozen["statistics"]
    typical = statistics["mean"][None] + statistics["scale"] * rng.standard_normal((200, 32))
    decoder = decoder_of(trainable, frozen)
    slot = prompt_embeddings(decoder, jnp.asarray(typical, jnp.float32), spec)[:, 3]
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    assert rms(slot) == pytest.approx(rms(frozen["original"]["embedding"]), rel=0.1)


@pytest.mark.parametrize("side", ["left", "right", "neither"])
def test_prompts_may_be_empty(side):
    """A side without tokens has no vectors; with neither there is no part at all."""
    names = ("decoder_left", "decoder_right", "encoder_left", "encoder_right")
    empty = {name: () for name in names if side not in name}
    spec = dataclasses.replace(tiny_spec(), **empty)
    trainable, frozen = untrained(spec)
    assert ("soft_prompt" in trainable["decoder"]) == (side != "neither")
    assert all(leaf.size for leaf in jax.tree.leaves((trainable, frozen)))  # Orbax refuses 0
    decoder = decoder_of(trainable, frozen)
    found = prompt_embeddings(decoder, jnp.ones((2, 32)), spec)
    n_left = len(spec.decoder_left)
    assert found.shape[1] == n_left + 1 + len(spec.decoder_right)
    np.testing.assert_array_equal(np.delete(found[0], n_left, axis=0), decoder.prompt_pD)


# --- the spec -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 48)
    return Tokenizer.from_folder(folder)


def test_prompts_become_tokens(tokenizer):
    lens = LensConfig(
        decoder_prompt="word9 word4 <embed> word5", encoder_prompt="word8<text>word7 word6"
    )
    spec = make_spec(tiny_spec().model, 2, lens, tokenizer)
    assert (spec.decoder_left, spec.decoder_right) == ((1, 9, 4), (5,))
    assert (spec.encoder_left, spec.encoder_right) == ((1, 8), (7, 6))
    assert (spec.bos, spec.layer, spec.text_len) == (1, 2, lens.text_len)
    assert hash(spec) == hash(make_spec(tiny_spec().model, 2, lens, tokenizer))
    bare = LensConfig(decoder_prompt="<embed>", encoder_prompt="<text>")
    spec = make_spec(tiny_spec().model, 0, bare, tokenizer)
    assert (spec.decoder_left, spec.decoder_right) == ((1,), ())
    assert (spec.encoder_left, spec.encoder_right) == ((1,), ())


def test_a_word_that_the_tokenizer_does_not_know_is_named(tokenizer):
    lens = LensConfig(decoder_prompt="word4 <embed> nonsense", encoder_prompt="<text>")
    with pytest.raises(ValueError, match="lens.decoder_prompt.*nonsense.*vocabulary"):
        make_spec(tiny_spec().model, 0, lens, tokenizer)
    lens = LensConfig(decoder_prompt="<embed>", encoder_prompt="rubbish <text>")
    with pytest.raises(ValueError, match="lens.encoder_prompt.*rubbish.*vocabulary"):
        make_spec(tiny_spec().model, 0, lens, tokenizer)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_model_does_not_have(tokenizer, layer):
    lens = LensConfig(decoder_prompt="<embed>")
    with pytest.raises(ValueError, match=f"model.layer={layer} is out of range.*layers 0 to 2"):
        make_spec(tiny_spec().model, layer, lens, tokenizer)
