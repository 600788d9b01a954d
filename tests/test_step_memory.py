"""What a joint step costs the compiler's memory as the text grows, and that it compiles once."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import plain_text, tiny_batch, tiny_lens, tiny_spec

from conlens_jax.config import ExperimentConfig, LossConfig, ScheduleConfig, WarmConfig
from conlens_jax.lens.encoder import encode_tokens
from conlens_jax.lens.objective import TERMS, Objective, joint_loss, prepare
from conlens_jax.lens.original import read_context, swapped_logits
from conlens_jax.lens.spec import encoder_of
from conlens_jax.training.state import Stage, init_state, make_step, stage_optimizer

COMPILED = "/jax/core/compile/backend_compile_duration"


def lens_for(text_len: int):
    """(trainable, frozen, batch, objective); every term of the loss but the anchor is on."""
    spec = tiny_spec(text_len=text_len, history_gradient="sweeps", history_sweeps=1)
    trainable, frozen = tiny_lens(spec)
    frozen |= {"warm_decoder": jax.tree.map(jnp.copy, trainable["decoder"])}
    batch = tiny_batch(spec, frozen["original"])
    warm = WarmConfig(before=text_len - 1, after=1)
    return trainable, frozen, batch, Objective(LossConfig(), warm, spec)


def temporary_bytes(text_len: int, *, plain: bool = False) -> int:
    """XLA's temporary memory for the gradient of the joint loss, text and context included; with
    ``plain``, for that of a text written by a pass over everything a token."""
    trainable, frozen, batch, objective = lens_for(text_len)
    spec = objective.spec
    noise = jnp.zeros((len(batch.lengths_G), text_len, spec.model.vocab_size))
    weights, tau = {name: jnp.float32(1) for name in TERMS}, jnp.float32(1)

    def ours(trainable, frozen, batch, noise):
        prepared = prepare(trainable, frozen, batch, noise, objective=objective)
        inputs = (trainable, frozen, batch, prepared, weights, tau)
        return jax.grad(joint_loss, has_aux=True)(*inputs, objective=objective)[0]

    def oracle(trainable, frozen, batch, noise):
        write = lambda trainable: jnp.sum(
            plain_text(trainable, frozen, batch.activation_BD, noise, tau, spec)[0] ** 2
        )
        return jax.grad(write)(trainable)

    program = jax.jit(oracle if plain else ours).lower(trainable, frozen, batch, noise)
    analysis = program.compile().memory_analysis()
    if analysis is None:
        pytest.skip("this backend does not tell its memory")
    return analysis.temp_size_in_bytes


def test_memory_grows_linearly_with_the_text():
    used = [temporary_bytes(text_len) for text_len in (4, 8, 16, 32)]
    assert used[3] < 2.3 * used[2], used
    # When T doubles, the increase of a straight line doubles and that of a parabola is fourfold.
    # Attention's T² weights are a visible share in a model as narrow as this one.
    first, second, third = np.diff(used)
    assert second < 3 * first and third < 3 * second, used


def test_the_same_measurement_sees_a_parabola():
    used = [temporary_bytes(text_len, plain=True) for text_len in (16, 32)]
    assert used[1] > 2.8 * used[0], used


@pytest.mark.parametrize("trained", ["full", "frozen"])
def test_gradients_of_frozen_matrices_are_not_made(trained):
    """The hand-written backward pass has cotangents for all weights; who is frozen needs none."""
    spec = tiny_spec(text_len=4, train_decoder=trained, train_encoder=trained)
    trainable, frozen = tiny_lens(spec)
    batch = tiny_batch(spec, frozen["original"])
    objective = Objective(LossConfig(lm=ScheduleConfig(start=0.0)), WarmConfig(3, 1), spec)
    noise = jnp.zeros((len(batch.lengths_G), 4, spec.model.vocab_size))
    weights, tau = {name: jnp.float32(1) for name in TERMS}, jnp.float32(1)

    def gradient(trainable, frozen, batch, noise):
        prepared = prepare(trainable, frozen, batch, noise, objective=objective)
        inputs = (trainable, frozen, batch, prepared, weights, tau)
        return jax.grad(joint_loss, has_aux=True)(*inputs, objective=objective)[0]

    program = jax.jit(gradient).lower(trainable, frozen, batch, noise).compile().as_text()
    width, mlp = spec.model.d_model, spec.model.d_mlp
    assert mlp not in (width, spec.model.vocab_size)
    # Products summed over the tokens, of the shape of a weight.
    shape = rf"f32\[(?:{width},{mlp}|{mlp},{width})\]"
    of_matrices = re.findall(shape + r"\S* dot\(.*lhs_contracting_dims=\{0\}", program)
    assert bool(of_matrices) == (trained == "full")


@pytest.mark.parametrize("remat", ["none", "products", "full"])
def test_layers_of_the_original_are_not_copied(remat):
    """By M's context, the swap above L and a frozen encoder's layers below it, and by the gradient
    where layers are recomputed."""
    spec = tiny_spec(layer=7, remat=remat, train_decoder="frozen", train_encoder="lora")
    deep = dataclasses.replace(spec.model, n_layers=16, d_mlp=1024)
    spec = dataclasses.replace(spec, model=deep)
    trainable, frozen = tiny_lens(spec)
    batch = tiny_batch(spec, frozen["original"])
    text_BT = jnp.zeros((len(batch.lengths_G), spec.text_len), jnp.int32)

    def loss(trainable, frozen, batch):
        original, mask_GS = frozen["original"], jnp.ones(batch.tokens_GS.shape, bool)
        context = read_context(
            original, batch.tokens_GS, mask_GS, batch.positions_B, horizon=2, spec=spec
        )
        read_BD = encode_tokens(encoder_of(trainable, frozen, spec), text_BT, spec=spec)
        return jnp.mean(swapped_logits(original, context, read_BD, spec=spec))

    function = loss if remat == "none" else jax.grad(loss)
    program = jax.jit(function).lower(trainable, frozen, batch).compile().as_text()
    width, mlp = spec.model.d_model, spec.model.d_mlp
    stacked = lambda layers: rf"f32\[{layers},(?:{width},{mlp}|{mlp},{width})\]"
    assert re.search(stacked(16), program)
    assert not re.search(stacked(8), program)  # below or above L


def test_a_step_compiles_once():
    trainable, frozen, batch, objective = lens_for(4)
    config = ExperimentConfig()
    stage = Stage("joint", 10, len(batch.lengths_G), config.joint.optimizer)
    optimizer = stage_optimizer(stage, trainable, stage.batch_size)
    step = make_step(stage, objective, optimizer, seed=0, n_rows=stage.batch_size)
    batches = [tiny_batch(objective.spec, frozen["original"], seed=seed) for seed in range(4)]
    state = init_state(trainable, optimizer)
    compiled = []
    listener = lambda name, seconds, **_: compiled.append(name) if name == COMPILED else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        counts, losses = [], []
        for batch in batches:
            before = len(compiled)
            state, metrics = jax.block_until_ready(step(state, frozen, batch))
            counts.append(len(compiled) - before)
            losses.append(metrics["loss"])
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert counts == [1, 0, 0, 0]
    assert len({float(loss) for loss in losses}) == len(losses)
