"""How good each gradient estimator is on a trained lens: the decoder's gradient through its text.

The cost is w_mse L_MSE + w_kl L_KL of a few rows, with the weights that the run ended with. Texts
cannot be listed here; the mean of many RLOO draws, unbiased but noisy, stands in for the true
gradient g. So the draws are kept as means of blocks, and every product in the table is between
different blocks: their noise is independent and adds no bias. The intervals come from leaving out
one block at a time (jackknife).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from conlens_jax.config import ConfigError, LossConfig, constant
from conlens_jax.config.estimator import Estimator
from conlens_jax.data.device_batches import make_batch
from conlens_jax.evaluation.report.report_data import HIGHER, LOWER, MetricGroup, MetricRow, Report
from conlens_jax.lens.batch import Batch
from conlens_jax.lens.gumbel import Purpose, drawn_noise, example_keys
from conlens_jax.lens.objective import Objective, joint_loss, prepare
from conlens_jax.lens.spec import init_lens
from conlens_jax.measurement.bootstrap import Interval
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.mesh import batch_sharding
from conlens_jax.training.run import placed
from conlens_jax.training.run_folder import load_lens
from conlens_jax.training.session import Session

# Name, estimator, tau.
Case = tuple[str, Estimator, float]
CASES: tuple[Case, ...] = (
    ("straight-through, tau 0.5", Estimator(), 0.5),
    ("straight-through, tau 1", Estimator(), 1.0),
    ("straight-through, tau 2", Estimator(), 2.0),
    ("Gumbel-Rao 4, tau 0.5", Estimator("gumbel_rao", 4), 0.5),
    ("Gumbel-Rao 16, tau 0.5", Estimator("gumbel_rao", 16), 0.5),
    ("ReinMax, tau 1", Estimator("reinmax"), 1.0),
    ("RLOO 4", Estimator("rloo", 4), 1.0),
)
REFERENCE = Estimator("rloo", 4)
BLOCKS = 8
_T_975 = 2.36  # of Student's t with BLOCKS − 1 degrees of freedom
_ROWS = (
    ("snr", "size of the mean over the spread of one draw", HIGHER),
    ("cosine", "of the mean to the true gradient", HIGHER),
    ("one_cosine", "of one draw to the true gradient, mean", HIGHER),
    ("size", "of the mean, as a share of the true gradient's", ""),
    ("bias", "distance of the mean from the true gradient, as a share of it", LOWER),
    ("spread", "standard deviation of one draw, as a share of the true gradient", LOWER),
)
Qualities = dict[str, Interval]


class Draws(NamedTuple):
    """The draws e as means over each of K blocks.

    ``mean_KP`` of e, ``direction_KP`` of e / ‖e‖, ``square_K`` of ‖e‖².
    """

    mean_KP: np.ndarray
    direction_KP: np.ndarray
    square_K: np.ndarray


@dataclasses.dataclass(frozen=True)
class Problem:
    """A lens, the rows it explains, and the weights of the cost.

    ``objective`` is that of the run; only its terms of the reconstruction are used.
    """

    trainable: Params
    frozen: Params
    batch: Batch
    objective: Objective
    weights: dict[str, Float[Array, ""]]
    seed: int = 0

    def with_estimator(self, estimator: Estimator) -> Objective:
        """The objective of the cost alone, without the gradient through another row's Δ, which the
        score function does not have."""
        spec = self.objective.spec
        lens = dataclasses.replace(
            spec.lens,
            estimator=estimator.kind,
            estimator_samples=estimator.samples,
            stop_gradient_delta=True,
        )
        return dataclasses.replace(
            self.objective,
            loss=cost_alone(self.objective.loss),
            spec=dataclasses.replace(spec, lens=lens),
        )


def cost_alone(loss: LossConfig) -> LossConfig:
    """The loss without the terms of D's distribution, which do not depend on its text."""
    return dataclasses.replace(loss, lm=constant(0.0), entropy=constant(0.0), text=constant(0.0))


def draw_blocks(
    problem: Problem, estimator: Estimator, tau: float, n_draws: int, first_draw: int = 0
) -> Draws:
    """Gradients of D's trained parts, concatenated, in :data:`BLOCKS` blocks.

    Args:
      n_draws: rounded up to whole blocks.
      first_draw: number of the first draw; the same numbers give the same noise.
    """
    objective = problem.with_estimator(estimator)
    per_block = -(-n_draws // BLOCKS)
    blocks = []
    for block in range(BLOCKS):
        sums = None
        for draw in range(first_draw + block * per_block, first_draw + (block + 1) * per_block):
            found = _one_draw(
                problem.trainable,
                problem.frozen,
                problem.batch,
                problem.weights,
                jnp.float32(tau),
                jnp.int32(draw),
                objective=objective,
                seed=problem.seed,
            )
            sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
        blocks.append([np.asarray(total, np.float64) / per_block for total in sums])
    return Draws(*(np.stack(parts) for parts in zip(*blocks, strict=True)))


@functools.partial(jax.jit, static_argnames=("objective", "seed"))
def _one_draw(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    weights: dict[str, Array],
    tau: Array,
    draw: Array,
    *,
    objective: Objective,
    seed: int,
) -> tuple[Array, Array, Array]:
    """(e, e / ‖e‖, ‖e‖²) of one draw."""
    spec, group = objective.spec, objective.texts_per_row
    texts_B = (batch.examples_B[:, None] * group + jnp.arange(group)[None]).reshape(-1)
    keys_B = example_keys(seed, draw, texts_B, Purpose.TRAINING_TEXT)
    noise = drawn_noise(keys_B, spec.text_len)
    own_keys_B = example_keys(seed, draw, texts_B, Purpose.ESTIMATOR)
    prepared = prepare(trainable, frozen, batch, noise, own_keys_B, objective=objective)

    def cost(decoder: Params) -> Array:
        lens = {**trainable, "decoder": decoder}
        total, _ = joint_loss(lens, frozen, batch, prepared, weights, tau, objective=objective)
        return total

    leaves = jax.tree.leaves(jax.grad(cost)(trainable["decoder"]))
    gradient_P = jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in leaves])
    square = jnp.sum(jnp.square(gradient_P))
    return gradient_P, gradient_P * jax.lax.rsqrt(square + 1e-30), square


def quality(draws: Draws, reference: Draws) -> Qualities:
    """The table's column of an estimator, with 95 % intervals; NaN where the noise is too large.

    Args:
      reference: unbiased draws, independent of ``draws``.
    """
    inner = _Inner(
        draws.mean_KP @ draws.mean_KP.T,
        reference.mean_KP @ reference.mean_KP.T,
        draws.mean_KP @ reference.mean_KP.T,
        draws.direction_KP @ reference.mean_KP.T,
        draws.square_K,
    )
    blocks = np.arange(len(draws.square_K))
    whole = inner.numbers(blocks)
    left_out = [inner.numbers(np.delete(blocks, block)) for block in blocks]
    n = len(blocks)
    found = {}
    for name, value in whole.items():
        values = np.array([numbers[name] for numbers in left_out])
        error = math.sqrt((n - 1) / n * np.sum((values - values.mean()) ** 2))
        found[name] = Interval(value, value - _T_975 * error, value + _T_975 * error)
    return found


@dataclasses.dataclass(frozen=True)
class _Inner:
    """Inner products of block means: of the draws, the reference, between them, and of the draws'
    directions with the reference."""

    own: np.ndarray
    reference: np.ndarray
    between: np.ndarray
    direction: np.ndarray
    square: np.ndarray

    def numbers(self, blocks: np.ndarray) -> dict[str, float]:
        kept = np.ix_(blocks, blocks)
        mean_square, true_square = _across(self.own[kept]), _across(self.reference[kept])
        product = float(np.mean(self.between[kept]))
        variance = float(np.mean(self.square[blocks])) - mean_square
        true_size, mean_size, spread = (
            math.sqrt(x) if x > 0 else math.nan for x in (true_square, mean_square, variance)
        )
        bias_square = mean_square - 2 * product + true_square
        return {
            "snr": mean_size / spread,
            "cosine": product / (mean_size * true_size),
            "one_cosine": float(np.mean(self.direction[kept])) / true_size,
            "size": mean_size / true_size,
            # Noise can put the estimate of a vanishing square below 0.
            "bias": math.sqrt(max(bias_square, 0.0)) / true_size,
            "spread": spread / true_size,
        }


def _across(gram: np.ndarray) -> float:
    """Mean product of two different blocks: of independent draws, so it is the mean's square."""
    n = len(gram)
    return float((gram.sum() - np.trace(gram)) / (n * (n - 1)))


def measure_lens(
    problem: Problem, n_draws: int, n_reference: int, cases: Sequence[Case] = CASES
) -> dict[str, Qualities]:
    """Every case against the mean of ``n_reference`` draws of :data:`REFERENCE`."""
    # Separate draw numbers: a case with the reference's estimator must not share its noise.
    reference = draw_blocks(problem, REFERENCE, 1.0, n_reference, first_draw=2**20)
    return {
        name: quality(draw_blocks(problem, estimator, tau, n_draws), reference)
        for name, estimator, tau in cases
    }


def open_problem(session: Session, checkpoint: str | Path, n_rows: int) -> Problem:
    """The lens of a run, and ``n_rows`` of the validation rows of its cache.

    Raises:
      ValueError: no such checkpoint, or a lens whose decoder gets no gradient through its text.
    """
    config = session.config
    (train, validation), reference = session.caches, session.reference
    template, frozen = init_lens(
        session.model.params, session.spec, reference.mean_D, reference.scale
    )
    if not template["decoder"]:
        raise ConfigError(f"--checkpoint={checkpoint}: no part of its decoder is trained")
    steps = config.joint.steps
    steps_per_epoch = len(train) / config.joint.batch_size
    schedules = session.objective.schedules(stage_steps=steps, steps_per_epoch=steps_per_epoch)
    weights = schedules(jnp.int32(steps)).weights
    if not (weights["mse"] or weights["kl"]):
        raise ConfigError(f"--checkpoint={checkpoint}: both loss.mse and loss.kl end at 0")
    # Rows of one document are adjacent: spread over the split they are of different documents.
    rows = validation.rows(np.linspace(0, len(validation) - 1, n_rows).astype(np.int64))
    return Problem(
        trainable=load_lens(checkpoint, placed(template, session)),
        frozen=frozen,
        batch=make_batch(rows, batch_sharding(session.mesh), n_rows),
        objective=session.objective,
        weights=weights,
    )


def build_lens_report(found: dict[str, Qualities], facts: Sequence[tuple[str, object]]) -> Report:
    """A page with the table."""
    rows = [
        MetricRow(name, text, better, [values[name] for values in found.values()])
        for name, text, better in _ROWS
    ]
    return Report(
        title="Gradient estimators on a trained lens",
        summary=(
            "The decoder's gradient of w_mse L_MSE + w_kl L_KL through its own sampled text; the "
            "true gradient is the mean of many RLOO draws."
        ),
        facts=facts,
        columns=list(found),
        metric_groups=[MetricGroup("Estimators", "", rows)],
        notes=[
            "Intervals (95 %) are of the noise of the draws on these rows, not of other rows.",
            "A score-function draw samples k texts per row, the others one.",
            "bias is 0 where its estimate is below 0; n/a: the noise is too large.",
        ],
    )
