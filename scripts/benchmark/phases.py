"""Each phase of a joint step as a separate program, and the whole step.

In the step all phases are one program, which XLA fuses and schedules, so the sum of the phases is
not the step's time. ``forward`` is the differentiated pass, including the residuals for the
backward pass, ``backward`` the rest, ``gradient`` the two in one program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmark import naive
from benchmark.measure import Measured, Runner
from conlens_jax.lens.decoder import decoder_head, generate, teacher_forced_states
from conlens_jax.lens.encoder import encode_embeddings
from conlens_jax.lens.gumbel import Purpose, drawn_noise, example_keys
from conlens_jax.lens.losses import entropy, kl_divergence, reconstruction_error
from conlens_jax.lens.objective import (
    Scheduled,
    joint_loss,
    prepare,
    reference_text,
    swap_vector,
)
from conlens_jax.lens.original import read_context, swapped_logits
from conlens_jax.lens.spec import decoder_of, encoder_of
from conlens_jax.models.embeddings import embed_tokens, scale_embeddings
from conlens_jax.planning.flops import Workload
from conlens_jax.training.optimizer import apply_updates, poison_if_not_finite
from conlens_jax.training.state import (
    Stage,
    TrainState,
    init_state,
    make_step,
    stage_optimizer,
)

_STEPS = 1000
Phases = dict[str, Measured]


def stage_of(work: Workload) -> Stage:
    joint = work.config.joint
    return Stage("joint", _STEPS, len(work.batch.positions_B), joint.optimizer)


def scheduled(work: Workload, step: jax.Array) -> Scheduled:
    """Weights and temperatures at a step."""
    size = len(work.batch.positions_B)
    return work.objective.schedules(stage_steps=_STEPS, steps_per_epoch=size)(step)


def draw_noise(work: Workload, step: jax.Array, examples_B: jax.Array) -> jax.Array:
    keys_B = example_keys(work.config.train.seed, step, examples_B, Purpose.TRAINING_TEXT)
    return drawn_noise(keys_B, work.spec.text_len).values(work.spec.model.vocab_size)


def with_history(work: Workload, history_gradient: str) -> Workload:
    lens = dataclasses.replace(work.spec.lens, history_gradient=history_gradient)
    spec = dataclasses.replace(work.spec, lens=lens)
    return dataclasses.replace(work, objective=dataclasses.replace(work.objective, spec=spec))


def our_phases(work: Workload, runner: Runner) -> Phases:
    """Phases of this implementation, in the order of the step."""
    spec, objective = work.spec, work.objective
    trainable, frozen, batch = work.trainable, work.frozen, work.batch
    original, found = frozen["original"], {}
    timed = _timer(runner, found)

    def forward_again(trainable, frozen, activation_BD, text_BT):
        decoder = decoder_of(trainable, frozen)
        states = teacher_forced_states(decoder, activation_BD, text_BT, spec=spec)
        return decoder_head(decoder, spec).logits(states)

    def encode(trainable, frozen, text_BT):
        encoder = encoder_of(trainable, frozen, spec)
        text_BTD = embed_tokens(encoder.base, text_BT, spec.model)
        return encode_embeddings(encoder, text_BTD, spec=spec)

    def prefix(original, batch):
        return read_context(
            original,
            batch.tokens_GS,
            batch.mask_GS,
            batch.positions_B,
            horizon=objective.loss.kl_horizon,
            spec=spec,
        )

    def swap(original, context, reconstruction_BD, activation_BD):
        vector_BD = swap_vector(reconstruction_BD, activation_BD, spec, batch.rows_per_document)
        return swapped_logits(original, context, vector_BD, spec=spec)

    def losses(reconstruction_BD, activation_BD, logits, reference, target, swapped, statistics):
        kind = objective.loss.mse_kind
        error_B = reconstruction_error(reconstruction_BD, activation_BD, statistics, kind)
        terms = kl_divergence(target, swapped), kl_divergence(reference, logits), entropy(logits)
        return [jnp.mean(term) for term in (error_B, *terms)]

    step = jnp.int32(0)
    activation_BD = batch.activation_BD
    noise, text_BT = _timed_decoding(work, timed)
    if objective.uses("lm"):
        refer = lambda *inputs: reference_text(*inputs, objective).logits()
        reference = timed("reference", refer, frozen, activation_BD, text_BT)
    context = timed("prefix pass", prefix, original, batch)
    logits = timed("re-forward", forward_again, trainable, frozen, activation_BD, text_BT)
    reconstruction = timed("encode", encode, trainable, frozen, text_BT)
    swapped = timed("swap", swap, original, context, reconstruction, activation_BD)
    target = context.logits_BhV
    rest = (reference, target, swapped, frozen["statistics"])
    timed("losses", losses, reconstruction, activation_BD, logits, *rest)

    weights, tau, _ = scheduled(work, step)
    prepared = jax.jit(functools.partial(prepare, objective=objective))(
        trainable, frozen, batch, noise
    )
    loss = lambda trainable, *inputs: joint_loss(trainable, *inputs, objective=objective)
    _differentiated(timed, loss, trainable, frozen, batch, prepared, weights, tau)
    _update_and_step(timed, found, work, runner, our_step)
    return found


def decoding(work: Workload, runner: Runner) -> Phases:
    """Only noise and decoding of this implementation."""
    found = {}
    _timed_decoding(work, _timer(runner, found))
    return found


def _timed_decoding(work: Workload, timed: Callable[..., Any]) -> tuple[jax.Array, jax.Array]:
    def decode(trainable, frozen, activation_BD, noise_BTV):
        decoder = decoder_of(trainable, frozen)
        return generate(decoder, activation_BD, noise_BTV, spec=work.spec)

    examples_B = work.batch.examples_B
    noise = timed("noise", functools.partial(draw_noise, work), jnp.int32(0), examples_B)
    inputs = work.trainable, work.frozen, work.batch.activation_BD, noise
    return noise, timed("decode", decode, *inputs)


def naive_phases(work: Workload, runner: Runner) -> Phases:
    """Phases of the naive step, whose D and E run for a and for a'."""
    spec, objective = work.spec, work.objective
    trainable, frozen, batch = work.trainable, work.frozen, work.batch
    original, found = frozen["original"], {}
    timed = _timer(runner, found)

    def decode(trainable, frozen, activation_BD, noise_BTV, tau):
        decoder = decoder_of(trainable, frozen)
        write = functools.partial(naive.write_text, decoder, tau=tau, spec=spec)
        other = write(jnp.roll(activation_BD, 1, axis=0), jnp.roll(noise_BTV, 1, axis=0))
        return write(activation_BD, noise_BTV), other[1]

    def encode(trainable, frozen, choice_BTV, other_BTV):
        encoder = encoder_of(trainable, frozen, spec)
        table_VD = encoder.base["embedding"]
        rows = lambda choice: jnp.matmul(choice.astype(table_VD.dtype), table_VD)
        read = lambda choice: encode_embeddings(
            encoder, scale_embeddings(rows(choice), spec.model), spec=spec
        )
        return read(choice_BTV), read(other_BTV)

    step = jnp.int32(0)
    weights, tau, _ = scheduled(work, step)
    noise = timed("noise", functools.partial(draw_noise, work), step, batch.examples_B)
    activation_BD = batch.activation_BD
    (logits, choice), other = timed("decode", decode, trainable, frozen, activation_BD, noise, tau)
    text_BT = jnp.argmax(choice, axis=-1).astype(jnp.int32)
    refer = lambda *inputs: reference_text(*inputs, objective).logits()
    reference = timed("reference", refer, frozen, activation_BD, text_BT)
    target = timed(
        "prefix pass", functools.partial(naive.target_logits, spec=spec), original, batch
    )
    reconstruction, _ = timed("encode", encode, trainable, frozen, choice, other)
    swap = functools.partial(naive.swapped_logits, spec=spec)
    swapped = timed("swap", swap, original, batch, reconstruction)
    losses = functools.partial(naive.loss_terms, objective=objective)
    rest = (reference, target, swapped, frozen["statistics"])
    timed("losses", losses, reconstruction, batch, logits, *rest)
    del target, swapped, logits, choice, other, reference, rest

    loss = lambda trainable, *inputs: naive.naive_loss(trainable, *inputs, objective=objective)
    _differentiated(timed, loss, trainable, frozen, batch, noise, weights, tau)
    _update_and_step(timed, found, work, runner, naive_step)
    return found


def our_step(work: Workload, runner: Runner) -> Measured:
    """Only the whole step, as compiled by ``make_step``."""
    stage, size = stage_of(work), len(work.batch.positions_B)
    optimizer = stage_optimizer(stage, work.trainable, size)
    seed = work.config.train.seed
    step = make_step(stage, work.objective, optimizer, seed=seed, n_rows=size)
    return _measured_step(step, optimizer, work, runner)


def naive_step(work: Workload, runner: Runner) -> Measured:
    """Only the whole naive step, with the same noise, optimizer and check for NaN."""
    stage, size = stage_of(work), len(work.batch.positions_B)
    optimizer = stage_optimizer(stage, work.trainable, size)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, frozen, batch):
        weights, tau, sample_tau = scheduled(work, state.step)
        noise_BTV = draw_noise(work, state.step, batch.examples_B) * sample_tau
        loss = functools.partial(naive.naive_loss, objective=work.objective)
        (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, frozen, batch, noise_BTV, weights, tau
        )
        grads = poison_if_not_finite(total, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        terms |= {"loss": total, "grad_norm": optax.tree.norm(grads)}
        params = apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), terms

    return _measured_step(train_step, optimizer, work, runner)


def _measured_step(step, optimizer, work: Workload, runner: Runner) -> Measured:
    # The step donates its state; the workload's weights are needed again.
    state = init_state(jax.tree.map(jnp.copy, work.trainable), optimizer)
    return runner.measure_step(step, state, work.frozen, work.batch)


def _timer(runner: Runner, found: Phases) -> Callable[..., Any]:
    """``timed(name, function, *inputs)`` measures a phase and returns its outputs."""

    def timed(name, function, *inputs):
        outputs, found[name] = runner.measure(function, *inputs)
        return outputs

    return timed


def _differentiated(timed, loss, trainable, *inputs) -> None:
    def forward(trainable, *inputs):
        run = lambda trainable: loss(trainable, *inputs)
        total, pull_back, _ = jax.vjp(run, trainable, has_aux=True)
        return total, pull_back

    total, pull_back = timed("forward", forward, trainable, *inputs)
    timed("backward", lambda pull_back, bar: pull_back(bar), pull_back, jnp.ones_like(total))
    del pull_back
    timed("gradient", jax.grad(loss, has_aux=True), trainable, *inputs)


def _update_and_step(timed, found: Phases, work: Workload, runner: Runner, step) -> None:
    optimizer = stage_optimizer(stage_of(work), work.trainable, len(work.batch.positions_B))

    def update(grads, opt_state, params):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return apply_updates(params, updates), opt_state, optax.tree.norm(grads)

    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), work.trainable)
    timed("update", update, grads, optimizer.init(work.trainable), work.trainable)
    del grads
    found["step"] = step(work, runner)
