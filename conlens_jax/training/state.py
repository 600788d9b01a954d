"""The train state and the jitted step of each stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from conlens_jax.config import ExperimentConfig, OptimizerConfig
from conlens_jax.lens.batch import Batch, with_activations
from conlens_jax.lens.gumbel import example_keys
from conlens_jax.lens.schedules import Schedule, make_schedule
from conlens_jax.lens.vocabulary import noise_of_texts
from conlens_jax.models.param_table import Params
from conlens_jax.training.objective import (
    TERMS,
    Metrics,
    Objective,
    joint_loss,
    prepare,
    warm_loss,
)
from conlens_jax.training.optimizer import (
    apply_updates,
    bad_steps_in_a_row,
    bad_steps_total,
    make_optimizer,
    poison_if_not_finite,
)

# Purposes of the training noise; evaluation draws with another.
SAMPLING, ESTIMATING = 1, 3
Step = Callable[["TrainState", Params, Batch], tuple["TrainState", Metrics]]


@flax.struct.dataclass
class TrainState:
    """What changes from step to step, and what a checkpoint holds.

    Attributes:
      step: optimizer steps done in this stage.
      params: trained parts of the lens (``trainable`` everywhere else).
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
      batch_size: rows of a step, over all micro-batches.
      optimizer: its settings.
      first_step: steps of the stages before it in this run (the x axis of the curves).
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
        """Whether there is a decoder to validate; baseline and audit are encoders alone."""
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


def init_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


def stage_optimizer(
    stage: Stage, trainable: Params, n_rows: int
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer of a stage and its learning-rate schedule."""
    learning_rate = make_schedule(
        stage.optimizer.learning_rate,
        stage_steps=stage.steps,
        steps_per_epoch=n_rows / stage.batch_size,
    )
    return make_optimizer(stage.optimizer, trainable, learning_rate=learning_rate), learning_rate


def make_step(
    stage: Stage,
    config: ExperimentConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learning_rate: Schedule,
    n_rows: int,
    state_shardings: TrainState | None = None,
) -> Step:
    """The jitted train step of a stage; the state is donated.

    ``state_shardings`` is where the state lies and stays. Without it the compiler chooses where
    the new state goes, which on a sharded mesh need not be where the old one came from.

    The batch is cut into ``optimizer.accumulate`` micro-batches whose gradients are averaged. A
    step whose loss or gradient is not finite changes nothing and is counted.
    """
    schedules = {
        name: make_schedule(
            getattr(config.loss, name),
            stage_steps=stage.steps,
            steps_per_epoch=n_rows / stage.batch_size,
        )
        for name in (*TERMS, "tau", "sample_tau")
    }

    def gradients(trainable: Params, frozen: Params, batch: Batch, step: Array):
        with jax.named_scope("capture"):
            batch = with_activations(batch, frozen["original"], objective.spec)
        if stage.supervised:
            loss = functools.partial(warm_loss, objective=objective)
            (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch)
            return total, terms, grads
        current = {name: schedule(step) for name, schedule in schedules.items()}
        tau, sample_tau = current.pop("tau"), current.pop("sample_tau")
        group = objective.texts_per_row
        texts_B = (batch.examples_B[:, None] * group + jnp.arange(group)).reshape(-1)
        keys_B = example_keys(config.train.seed, step, texts_B, SAMPLING)
        # argmax(logits / s + g) = argmax(logits + s g): scaled noise samples at temperature s.
        spec = objective.spec
        noise = noise_of_texts(keys_B, spec.text_len, spec.model.vocab_size, sample_tau)
        own_keys_B = example_keys(config.train.seed, step, texts_B, ESTIMATING)
        prepared = prepare(trainable, frozen, batch, noise, own_keys_B, objective=objective)
        loss = functools.partial(joint_loss, objective=objective)
        (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(
            trainable, frozen, batch, prepared, current, tau
        )
        scheduled = {f"weight_{name}": value for name, value in current.items()}
        return total, {**terms, **scheduled, "tau": tau}, grads

    def accumulated(trainable: Params, frozen: Params, batch: Batch, step: Array):
        parts = stage.optimizer.accumulate
        if parts == 1:
            return gradients(trainable, frozen, batch, step)
        micro = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        one = lambda batch: gradients(trainable, frozen, batch, step)
        first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        add = lambda total, batch: (jax.tree.map(jnp.add, total, one(batch)), None)
        total, _ = jax.lax.scan(add, zeros, micro)
        return jax.tree.map(lambda x: x / parts, total)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_shardings, None))
    def train_step(state: TrainState, frozen: Params, batch: Batch):
        total, terms, grads = accumulated(state.params, frozen, batch, state.step)
        grads = poison_if_not_finite(total, grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = apply_updates(state.params, updates)
        metrics = {
            "loss": total,
            **terms,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
            "bad_steps_in_a_row": bad_steps_in_a_row(opt_state),
            "bad_steps": bad_steps_total(opt_state),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step
