"""The decoder against one full forward pass a token, differentiated by autodiff."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import (
    BATCH,
    TEXT_LEN,
    cosine,
    plain_prompt,
    plain_text,
    relative_error,
    teacher_forced_logits,
    text_logits,
    tiny_batch,
    tiny_lens,
    tiny_noise,
    tiny_spec,
)
from tiny_models import empty_cache

from conlens_jax.config import LensConfig
from conlens_jax.lens.decoder import generate
from conlens_jax.lens.history import backward_sweeps
from conlens_jax.lens.spec import decoder_of
from conlens_jax.models.embeddings import add_position_embeddings, scale_embeddings
from conlens_jax.models.transformer import all_positions, run_layers, unembed

VARIANTS = {"untied": False, "tied": True}
TEMPERATURES = (0.1, 0.5, 1.0, 2.0)


@functools.cache
def case(name: str):
    """(spec, trainable, frozen, activation, noise, cotangent of the logits)."""
    spec = tiny_spec(tied=VARIANTS[name])
    trainable, frozen = tiny_lens(spec)
    activation_BD = tiny_batch(spec, frozen["original"]).activation_BD
    cotangent = np.random.default_rng(5).standard_normal((BATCH, TEXT_LEN, 48)).astype(np.float32)
    return spec, trainable, frozen, activation_BD, tiny_noise(), jnp.asarray(cotangent)


@functools.partial(jax.jit, static_argnames="spec")
def write(trainable, frozen, activation_BD, noise_BTV, *, spec):
    return generate(decoder_of(trainable, frozen), activation_BD, noise_BTV, spec=spec)


@functools.partial(jax.jit, static_argnames="spec")
def pulled(trainable, frozen, activation_BD, text_BT, noise_BTV, tau, cotangent, *, spec):
    """Logits, and the gradient of ⟨logits, cotangent⟩ for (trainable decoder, activation)."""

    def run(decoder, activation_BD):
        parts = decoder_of({"decoder": decoder}, frozen)
        return text_logits(parts, activation_BD, text_BT, noise_BTV, tau, spec)

    logits, pull = jax.vjp(run, trainable["decoder"], activation_BD)
    return logits, pull(cotangent)


@functools.partial(jax.jit, static_argnames="spec")
def oracle(trainable, frozen, activation_BD, noise_BTV, tau, cotangent, history, *, spec):
    def run(decoder, activation_BD):
        return plain_text(
            {"decoder": decoder}, frozen, activation_BD, noise_BTV, tau, spec, history
        )

    logits, pull, choices = jax.vjp(run, trainable["decoder"], activation_BD, has_aux=True)
    return logits, jnp.argmax(choices, axis=-1), pull(cotangent)


def with_history(spec, kind: str, sweeps: int = 1):
    lens = dataclasses.replace(spec.lens, history_gradient=kind, history_sweeps=sweeps)
    return dataclasses.replace(spec, lens=lens)


@functools.cache
def text_of(name: str):
    spec, trainable, frozen, activation_BD, noise_BTV, _ = case(name)
    return write(trainable, frozen, activation_BD, noise_BTV, spec=spec)


def ours(name: str, tau: float, *history):
    spec, trainable, frozen, activation_BD, noise_BTV, cotangent = case(name)
    return pulled(
        trainable,
        frozen,
        activation_BD,
        text_of(name),
        noise_BTV,
        jnp.float32(tau),
        cotangent,
        spec=with_history(spec, *(history or ["exact"])),
    )


def theirs(name: str, tau: float, history: float = 1.0):
    spec, trainable, frozen, activation_BD, noise_BTV, cotangent = case(name)
    return oracle(
        trainable,
        frozen,
        activation_BD,
        noise_BTV,
        jnp.float32(tau),
        cotangent,
        jnp.float32(history),
        spec=spec,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_sampled_text_is_that_of_the_plain_loop(name):
    logits, tokens, _ = theirs(name, 1.0)
    np.testing.assert_array_equal(text_of(name), tokens)
    assert len(np.unique(tokens, axis=0)) > BATCH // 2 and len(np.unique(tokens)) > 5
    ours_logits, _ = ours(name, 1.0)
    np.testing.assert_allclose(ours_logits, logits, rtol=0, atol=2e-5)


def test_greedy_text_is_that_of_the_plain_loop():
    spec, trainable, frozen, activation_BD, noise_BTV, cotangent = case("untied")
    text = write(trainable, frozen, activation_BD, None, spec=spec)
    _, tokens, _ = oracle(
        trainable,
        frozen,
        activation_BD,
        jnp.zeros_like(noise_BTV),
        jnp.float32(1.0),
        cotangent,
        jnp.float32(1.0),
        spec=spec,
    )
    np.testing.assert_array_equal(text, tokens)
    assert np.any(np.asarray(text) != np.asarray(text_of("untied")))


def test_teacher_forcing_on_own_text_gives_the_logits_it_was_sampled_from():
    spec, trainable, frozen, activation_BD, noise_BTV, _ = case("untied")
    text_BT = text_of("untied")
    force = jax.jit(functools.partial(teacher_forced_logits, spec=spec))
    logits = force(decoder_of(trainable, frozen), activation_BD, text_BT)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(np.argmax(logits + noise_BTV, axis=-1), text_BT)
    # Each token is predicted from those before it: changing the last one changes nothing.
    changed = force(decoder_of(trainable, frozen), activation_BD, text_BT.at[:, -1].set(4))
    np.testing.assert_array_equal(changed, logits)
    changed = force(decoder_of(trainable, frozen), activation_BD, text_BT.at[:, 1].set(4))
    moved = np.abs(np.asarray(changed - logits)).max(axis=(0, 2)) > 1e-3
    assert moved.tolist() == [False, False, True, True]


@functools.partial(jax.jit, static_argnames="spec")
def cached_scan(trainable, frozen, activation_BD, noise_BTV, tau, cotangent, *, spec):
    """Gradient by autodiff straight through the decoding loop and its key-value cache."""

    def run(decoder, activation_BD):
        parts = {"decoder": decoder}
        base, prompt = decoder["base"], plain_prompt(parts, frozen, activation_BD, spec)
        length, last = prompt.shape[1], TEXT_LEN - 1
        logits_of = lambda x: unembed(base, x, config=spec.model)
        start = empty_cache(spec.model, BATCH, length + last)
        run = functools.partial(run_layers, base["layers"], config=spec.model)
        positions = all_positions(BATCH, length)
        prompt = add_position_embeddings(base, prompt, positions, spec.model)
        x, cache = run(prompt, positions, cache=start, slot=jnp.int32(0))

        def write(carry, step):
            state, cache = carry
            logits = logits_of(state)
            noisy = logits + noise_BTV[:, step]
            soft = jax.nn.softmax(noisy / tau)
            hard = jax.nn.one_hot(jnp.argmax(noisy, axis=-1), noisy.shape[-1])
            choice = hard + soft - jax.lax.stop_gradient(soft)
            slot = length + step
            position = jnp.broadcast_to(slot, (BATCH, 1))
            embedding = scale_embeddings(choice @ base["embedding"], spec.model)[:, None]
            x, cache = run(
                add_position_embeddings(base, embedding, position, spec.model),
                position,
                cache=cache,
                slot=slot,
            )
            return (x[:, 0], cache), logits

        steps = jnp.arange(TEXT_LEN, dtype=jnp.int32)
        _, logits = jax.lax.scan(write, (x[:, -1], cache), steps)
        return logits.swapaxes(0, 1)

    logits, pull = jax.vjp(run, trainable["decoder"], activation_BD)
    return logits, pull(cotangent)


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_exact_gradient_is_that_of_the_cached_loop(name, tau):
    spec, *inputs, cotangent = case(name)
    logits, expected = cached_scan(*inputs, jnp.float32(tau), cotangent, spec=spec)
    ours_logits, gradient = ours(name, tau)
    np.testing.assert_allclose(ours_logits, logits, rtol=0, atol=2e-5)
    # 1 / tau multiplies the rounding of the logits: at 0.1 two oracles differ by 0.7e-5 already.
    _, _, naive = theirs(name, tau)
    assert relative_error(gradient, expected) < max(1e-5, 2 * relative_error(expected, naive))


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_exact_gradient_is_that_of_autodiff(name, tau):
    _, _, (decoder, activation) = theirs(name, tau)
    _, (our_decoder, our_activation) = ours(name, tau)
    assert set(our_decoder) == {"projection", "soft_prompt", "base"}
    limit = 1e-5 * max(1, 0.2 / tau)  # see above
    assert relative_error((our_decoder, our_activation), (decoder, activation)) < limit


def test_detached_gradient_takes_the_history_as_a_constant():
    _, _, oracle_gradient = theirs("untied", 0.5, history=0.0)
    assert relative_error(ours("untied", 0.5, "detached")[1], oracle_gradient) < 1e-5


def test_each_sweep_comes_closer_to_the_exact_gradient():
    _, _, exact = theirs("untied", 0.5)
    miss = lambda *history: 1 - cosine(ours("untied", 0.5, *history)[1], exact)
    detached, one, two = miss("detached"), miss("sweeps", 1), miss("sweeps", 2)
    assert detached > 1e-3  # the history matters here
    assert one < 0.8 * detached
    assert two < 0.8 * one
    assert relative_error(ours("untied", 0.5, "sweeps", 3)[1], exact) < 1e-5


@pytest.mark.parametrize(
    ("kind", "asked", "sweeps"),
    [("exact", 1, 7), ("detached", 1, 0), ("sweeps", 0, 0), ("sweeps", 2, 2), ("sweeps", 12, 7)],
)
def test_number_of_sweeps(kind, asked, sweeps):
    lens = LensConfig(history_gradient=kind, history_sweeps=asked)
    assert backward_sweeps(lens, text_len=8) == sweeps
    assert backward_sweeps(lens, text_len=1) == 0


def test_gradient_of_a_frozen_base_with_its_own_head_and_recomputed_layers():
    """The same network, with less of it trained and layers recomputed in the backward pass."""
    _, trainable, frozen, activation_BD, noise_BTV, cotangent = case("untied")
    spec = tiny_spec(train_decoder="frozen", train_output_head=True, remat="full")
    decoder = dict(trainable["decoder"])
    base = decoder.pop("base")
    decoder["output_head"] = base["output_head"]
    frozen = frozen | {"original": base | {"output_head": jnp.zeros_like(base["output_head"])}}
    _, gradient = pulled(
        {"decoder": decoder},
        frozen,
        activation_BD,
        text_of("untied"),
        noise_BTV,
        jnp.float32(0.5),
        cotangent,
        spec=spec,
    )
    _, _, (whole, activation) = theirs("untied", 0.5)
    expected = {name: whole[name] for name in ("projection", "soft_prompt")}
    expected["output_head"] = whole["base"]["output_head"]
    assert relative_error(gradient, (expected, activation)) < 1e-5


def test_text_of_one_token():
    """There is no history: the gradient is that of the first token of a longer text."""
    spec = tiny_spec(text_len=1, history_gradient="sweeps", history_sweeps=1)
    longer, trainable, frozen, activation_BD, noise_BTV, cotangent = case("untied")
    tau = jnp.float32(1.0)
    text_BT = write(trainable, frozen, activation_BD, noise_BTV[:, :1], spec=spec)
    np.testing.assert_array_equal(text_BT, text_of("untied")[:, :1])
    inputs = (trainable, frozen, activation_BD)
    _, gradient = pulled(*inputs, text_BT, noise_BTV[:, :1], tau, cotangent[:, :1], spec=spec)
    first = cotangent.at[:, 1:].set(0.0)
    _, _, expected = oracle(*inputs, noise_BTV, tau, first, jnp.float32(1.0), spec=longer)
    # No token is read, so the embedding gets nothing from either.
    assert not np.any(gradient[0]["base"].pop("embedding"))
    assert not np.any(expected[0]["base"].pop("embedding"))
    assert relative_error(gradient, expected) < 1e-5
