"""The train state and the train step of each stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from conlens_jax.config import ExperimentConfig, OptimizerConfig
from conlens_jax.lens.batch import Batch, with_activations
from conlens_jax.lens.gumbel import Purpose, example_keys
from conlens_jax.lens.objective import (
    Metrics,
    Objective,
    Scheduled,
    joint_loss,
    prepare,
    warm_loss,
)
from conlens_jax.lens.schedules import Schedule, make_schedule
from conlens_jax.lens.vocabulary import noise_of_texts
from conlens_jax.models.param_table import Params
from conlens_jax.training.optimizer import (
    apply_updates,
    make_optimizer,
    poison_if_not_finite,
)

Step = Callable[["TrainState", Params, Batch], tuple["TrainState", Metrics]]
Gradients = Callable[[Params, Params, Batch, Array], tuple[Array, Metrics, Params]]
"""(trainable, frozen, batch, step) → (loss, terms, gradients of what is trainable)."""


@flax.struct.dataclass
class TrainState:
    """The state that a step updates and a checkpoint contains.

    Attributes:
      step: optimizer steps done in this stage.
      params: the trained parts of the lens (``trainable`` elsewhere).
      opt_state: state of optax.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of training: warm start, joint training, supervised control, encoder baseline.

    Attributes:
      name: ``"warm"``, ``"joint"``, ``"control"``, ``"baseline"`` or ``"audit"``.
      steps: optimizer steps.
      batch_size: rows per step, over all micro-batches.
      optimizer: its settings.
      first_step: steps of the earlier stages of this run (the offset on the x axis of curves).
      rows_per_document: rows of a batch that share a context.
    """

    name: str
    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    first_step: int = 0
    rows_per_document: int = 1

    @property
    def supervised(self) -> bool:
        return self.name != "joint"

    @property
    def writes_text(self) -> bool:
        """Whether there is a decoder to validate; baseline and audit train only an encoder."""
        return self.name not in ("baseline", "audit")


def stages_of(config: ExperimentConfig) -> tuple[Stage, Stage]:
    """The warm start and the joint stage."""
    warm = Stage("warm", config.warm.steps, config.warm.batch_size, config.warm.optimizer)
    joint = Stage(
        "joint",
        config.joint.steps,
        config.joint.batch_size,
        config.joint.optimizer,
        first_step=warm.steps,
        rows_per_document=config.joint.rows_per_document,
    )
    return warm, joint


def init_state(
    trainable: Params, optimizer: optax.GradientTransformation | StageOptimizer
) -> TrainState:
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


class StageOptimizer(NamedTuple):
    """An optax transformation with the schedule of its learning rate, which is logged."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: Schedule


def stage_optimizer(stage: Stage, trainable: Params, n_rows: int) -> StageOptimizer:
    """The optimizer of a stage that trains on ``n_rows`` rows."""
    learning_rate = make_schedule(
        stage.optimizer.learning_rate,
        stage_steps=stage.steps,
        steps_per_epoch=n_rows / stage.batch_size,
    )
    optimizer = make_optimizer(stage.optimizer, trainable, learning_rate=learning_rate)
    return StageOptimizer(optimizer.init, optimizer.update, learning_rate)


def make_step(
    stage: Stage,
    objective: Objective,
    optimizer: StageOptimizer,
    *,
    seed: int,
    n_rows: int,
    state_shardings: TrainState | None = None,
) -> Step:
    """:func:`train_step` of a stage, jitted; the state is donated.

    Args:
      seed: for the noise that the texts are sampled with, and the gaps in targets.
      n_rows: rows of the training data, for schedules in epochs.
      state_shardings: of the state, and of the new state. Without them the compiler chooses the
        new state's shardings, which on a mesh can differ from the old ones.
    """
    if stage.supervised:
        gradients = functools.partial(supervised_gradients, objective=objective, seed=seed)
    else:
        steps_per_epoch = n_rows / stage.batch_size
        schedules = objective.schedules(stage_steps=stage.steps, steps_per_epoch=steps_per_epoch)
        gradients = functools.partial(
            joint_gradients, objective=objective, schedules=schedules, seed=seed
        )
    step = functools.partial(
        train_step,
        gradients=accumulated(gradients, stage.optimizer.accumulate),
        optimizer=optimizer,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def train_step(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    *,
    gradients: Gradients,
    optimizer: StageOptimizer,
) -> tuple[TrainState, Metrics]:
    """One optimizer step. If the loss or a gradient is not finite, only the counts of steps
    change."""
    total, terms, grads = gradients(state.params, frozen, batch, state.step)
    grads = poison_if_not_finite(total, grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates)
    metrics = {
        "loss": total,
        **terms,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": optimizer.learning_rate(state.step),
        "bad_steps_in_a_row": opt_state.notfinite_count,
        "bad_steps": opt_state.total_notfinite,
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def supervised_gradients(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    step: Array,
    *,
    objective: Objective,
    seed: int,
) -> tuple[Array, Metrics, Params]:
    """(loss, terms, gradients) of the warm start's loss, on the targets."""
    batch = captured(batch, frozen, objective)
    gap_keys_B = example_keys(seed, step, batch.examples_B, Purpose.GAPS)
    loss = functools.partial(warm_loss, objective=objective)
    (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(
        trainable, frozen, batch, gap_keys_B
    )
    return total, terms, grads


def joint_gradients(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    step: Array,
    *,
    objective: Objective,
    schedules: Callable[[Array], Scheduled],
    seed: int,
) -> tuple[Array, Metrics, Params]:
    """(loss, terms, gradients) of the joint loss, through texts sampled with the noise of
    (seed, step, row of the batch, text of the row)."""
    batch = captured(batch, frozen, objective)
    spec, k, now = objective.spec, objective.texts_per_row, schedules(step)
    texts_B = (batch.examples_B[:, None] * k + jnp.arange(k)[None]).reshape(-1)
    keys_B = example_keys(seed, step, texts_B, Purpose.TRAINING_TEXT)
    # argmax(logits / s + g) = argmax(logits + s g): scaled noise samples at temperature s.
    noise = noise_of_texts(keys_B, spec.text_len, spec.model.vocab_size, now.sample_tau)
    estimator_keys_B = example_keys(seed, step, texts_B, Purpose.ESTIMATOR)
    gap_keys_B = example_keys(seed, step, batch.examples_B, Purpose.GAPS)
    keys = (estimator_keys_B, gap_keys_B)
    prepared = prepare(trainable, frozen, batch, noise, *keys, objective=objective)
    loss = functools.partial(joint_loss, objective=objective)
    (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(
        trainable, frozen, batch, prepared, now.weights, now.tau
    )
    scheduled = {f"weight_{name}": weight for name, weight in now.weights.items()}
    return total, {**terms, **scheduled, "tau": now.tau}, grads


def captured(batch: Batch, frozen: Params, objective: Objective) -> Batch:
    with jax.named_scope("capture"):
        return with_activations(batch, frozen["original"], objective.spec)


def accumulated(gradients: Gradients, parts: int) -> Gradients:
    """The mean of ``gradients`` over ``parts`` micro-batches, computed in sequence."""
    if parts == 1:
        return gradients

    def mean(trainable: Params, frozen: Params, batch: Batch, step: Array):
        micro = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        one = lambda batch: gradients(trainable, frozen, batch, step)
        first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        add = lambda total, batch: (jax.tree.map(jnp.add, total, one(batch)), None)
        total, _ = jax.lax.scan(add, zeros, micro)
        return jax.tree.map(lambda x: x / parts, total)

    return mean
