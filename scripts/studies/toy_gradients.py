"""How good each gradient estimator is, on a toy whose true gradient is known by enumeration.

The toy is a miniature decoder: two tokens out of five, the logits of the second depend on the
embedding of the first, and the cost is a non-linear function of both embeddings. All 25 texts can
be listed, so the gradient of the expected cost is exact, and an estimator's bias and variance can
be separated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from conlens_jax.config.estimator import SCORE_FUNCTION, Estimator
from conlens_jax.config.seeds import random_key
from conlens_jax.evaluation.report.report_data import HIGHER, LOWER, MetricGroup, MetricRow, Report
from conlens_jax.evaluation.report.svg import CurveChart, Series
from conlens_jax.lens.gumbel import straight_through_embed
from conlens_jax.lens.policy import policy_loss
from conlens_jax.measurement.bootstrap import Interval

VOCAB, WIDTH = 5, 3
Policy = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Toy:
    """The fixed side: ``table`` [V, D] of embeddings and the cost's ``mixing`` [2D, D]."""

    table_VD: Float[Array, "V D"]
    mixing: Float[Array, "e D"]

    def cost(self, embedded_2D: Float[Array, "2 D"]) -> Float[Array, ""]:
        """Non-linear in both embeddings, so that no estimator is right by luck."""
        hidden = jnp.tanh(embedded_2D.reshape(-1) @ self.mixing)
        return jnp.sum(hidden**2) + hidden[0] * hidden[1] - hidden[2]

    def expected_cost(self, policy: Policy, sample_tau: float = 1.0) -> Float[Array, ""]:
        """Over all 25 texts, sampled at that temperature; differentiable: the truth."""
        first_V = jax.nn.softmax(policy["first"] / sample_tau)
        second_VV = self.table_VD @ policy["next"] + policy["bias"][None]
        second_VV = jax.nn.softmax(second_VV / sample_tau, axis=-1)
        pairs = jnp.stack(jnp.meshgrid(*[jnp.arange(VOCAB)] * 2, indexing="ij"), axis=-1)
        costs_VV = jax.vmap(jax.vmap(lambda pair: self.cost(self.table_VD[pair])))(pairs)
        return jnp.sum(first_V[:, None] * second_VV * costs_VV)


def make_toy(seed: int = 0) -> tuple[Toy, Policy]:
    """A toy and a policy that is neither uniform nor deterministic."""
    keys = jax.random.split(random_key(seed), 5)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32)
    toy = Toy(normal(keys[0], VOCAB, WIDTH), 0.5 * normal(keys[1], 2 * WIDTH, WIDTH))
    policy = {
        "first": normal(keys[2], VOCAB),
        "next": normal(keys[3], WIDTH, VOCAB),
        "bias": 0.5 * normal(keys[4], VOCAB),
    }
    return toy, policy


def relaxed_cost(
    policy: Policy,
    toy: Toy,
    key: Key[Array, ""],
    tau: Float[Array, ""],
    sample_tau: Float[Array, ""],
    estimator: Estimator,
) -> Float[Array, ""]:
    """The cost of one sampled text, with the estimator's gradient to the policy."""
    noise_key, own_key = jax.random.split(key)
    noise_2V = sample_tau * jax.random.gumbel(noise_key, (2, VOCAB), jnp.float32)
    own_keys = jax.random.split(own_key, 2)

    def write(logits_V: Array, step: int) -> Array:
        token = jnp.argmax(logits_V + noise_2V[step])[None]
        return straight_through_embed(
            logits_V[None],
            noise_2V[step][None],
            token,
            toy.table_VD,
            tau,
            estimator=estimator,
            keys=own_keys[step][None],
        )[0]

    first_D = write(policy["first"], 0)
    second_D = write(first_D @ policy["next"] + policy["bias"], 1)
    return toy.cost(jnp.stack([first_D, second_D]))


def score_function_cost(
    policy: Policy,
    toy: Toy,
    key: Key[Array, ""],
    tau: Float[Array, ""],
    sample_tau: Float[Array, ""],
    estimator: Estimator,
) -> Float[Array, ""]:
    """The surrogate of a group of texts, sampled at temperature 1; neither tau is used."""
    del tau, sample_tau

    def write(key: Array) -> tuple[Int[Array, "2"], Float[Array, ""]]:
        first_key, second_key = jax.random.split(key)
        first = jax.random.categorical(first_key, policy["first"])
        logits_V = toy.table_VD[first] @ policy["next"] + policy["bias"]
        second = jax.random.categorical(second_key, logits_V)
        log_p = jax.nn.log_softmax(policy["first"])[first] + jax.nn.log_softmax(logits_V)[second]
        return jnp.stack([first, second]), log_p

    tokens_k2, log_p_k = jax.vmap(write)(jax.random.split(key, estimator.samples))
    cost_k = jax.vmap(lambda tokens: toy.cost(toy.table_VD[tokens]))(tokens_k2)
    return policy_loss(cost_k, log_p_k, estimator.samples, estimator.kind)


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of one estimator, against the true gradient g; the estimate of one draw is e, its mean m.

    Attributes:
      snr: ‖m‖ / √(E‖e − m‖²).
      cosine: of m to g; one_cosine: mean cosine of a single draw to g.
      bias: ‖m − g‖ / ‖g‖; bias_noise: what that would be without bias, for so few draws.
      spread: √(E‖e − m‖²) / ‖g‖.
    """

    snr: float
    cosine: float
    one_cosine: float
    bias: float
    bias_noise: float
    spread: float


def true_gradient(toy: Toy, policy: Policy, sample_tau: float = 1.0) -> np.ndarray:
    """[parameters], of the expected cost of texts sampled at that temperature."""
    return _flat(jax.grad(toy.expected_cost)(policy, sample_tau))


def draw_gradients(
    toy: Toy,
    policy: Policy,
    estimator: Estimator,
    tau: float,
    n_draws: int,
    seed: int = 0,
    sample_tau: float = 1.0,
) -> np.ndarray:
    """Gradients [n_draws, parameters] of independent draws."""
    taus = jnp.float32(tau), jnp.float32(sample_tau)
    draws = _draws(toy.table_VD, toy.mixing, policy, *taus, estimator, n_draws, seed)
    return np.asarray(draws, np.float64)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _draws(table_VD, mixing, policy, tau, sample_tau, estimator, n_draws, seed):
    cost = score_function_cost if estimator.kind in SCORE_FUNCTION else relaxed_cost

    def one(key):
        toy = Toy(table_VD, mixing)
        gradient = jax.grad(cost)(policy, toy, key, tau, sample_tau, estimator)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(gradient)])

    return jax.vmap(one)(jax.random.split(random_key(seed), n_draws))


def quality(draws: np.ndarray, truth: np.ndarray) -> Quality:
    mean, size = draws.mean(axis=0), np.linalg.norm(truth)
    spread = math.sqrt(np.mean(np.sum((draws - mean) ** 2, axis=1)))
    lengths = np.maximum(np.linalg.norm(draws, axis=1), 1e-30)
    return Quality(
        snr=float(np.linalg.norm(mean) / max(spread, 1e-30)),
        cosine=float(mean @ truth / np.linalg.norm(mean) / size),
        one_cosine=float(np.mean(draws @ truth / lengths) / size),
        bias=float(np.linalg.norm(mean - truth) / size),
        bias_noise=float(spread / math.sqrt(len(draws)) / size),
        spread=float(spread / size),
    )


# Name, estimator, tau, and the temperature at which the text is sampled.
CASES = (
    ("straight-through, tau 0.5", Estimator(), 0.5, 1.0),
    ("straight-through, tau 1", Estimator(), 1.0, 1.0),
    ("straight-through, tau 2", Estimator(), 2.0, 1.0),
    ("straight-through, tau 1, sampled at 0.5", Estimator(), 1.0, 0.5),
    ("Gumbel-Rao 4, tau 0.5", Estimator("gumbel_rao", 4), 0.5, 1.0),
    ("Gumbel-Rao 16, tau 0.5", Estimator("gumbel_rao", 16), 0.5, 1.0),
    ("ReinMax, tau 1", Estimator("reinmax"), 1.0, 1.0),
    ("RLOO 2", Estimator("rloo", 2), 1.0, 1.0),
    ("RLOO 4", Estimator("rloo", 4), 1.0, 1.0),
    ("GRPO 4", Estimator("grpo", 4), 1.0, 1.0),
)
_TAUS = (0.25, 0.5, 1.0, 2.0, 4.0)
_SWEPT = (("straight-through", Estimator()), ("Gumbel-Rao 16", Estimator("gumbel_rao", 16)))
_SWEPT += (("ReinMax", Estimator("reinmax")),)
_ROWS = (
    ("snr", "size of the mean over the spread of one draw", HIGHER),
    ("cosine", "of the mean to the true gradient", HIGHER),
    ("one_cosine", "of one draw to the true gradient, mean", HIGHER),
    ("bias", "distance of the mean from the true gradient, as a share of it", LOWER),
    ("bias_noise", "what the row above would be without bias", ""),
    ("spread", "standard deviation of one draw, as a share of the true gradient", LOWER),
)


def measure(n_draws: int, seed: int = 0) -> dict[str, Quality]:
    """Every case of :data:`CASES`, against the gradient of the cost of the texts it samples."""
    toy, policy = make_toy(seed)
    return {
        name: quality(
            draw_gradients(toy, policy, estimator, tau, n_draws, sample_tau=sample_tau),
            true_gradient(toy, policy, sample_tau),
        )
        for name, estimator, tau, sample_tau in CASES
    }


def build_report(found: dict[str, Quality], n_draws: int, seed: int = 0) -> Report:
    """A page with the table and the bias and spread against tau."""
    toy, policy = make_toy(seed)
    truth = true_gradient(toy, policy)
    swept = {
        name: [
            quality(draw_gradients(toy, policy, estimator, tau, n_draws), truth) for tau in _TAUS
        ]
        for name, estimator in _SWEPT
    }
    charts = [
        CurveChart(title, "log2 tau", label, _series(swept, field))
        for field, title, label in (
            ("bias", "Bias against temperature", "‖m − g‖ / ‖g‖"),
            ("spread", "Spread of one draw against temperature", "σ / ‖g‖"),
        )
    ]
    rows = [
        MetricRow(
            field, text, better, [Interval(getattr(value, field)) for value in found.values()]
        )
        for field, text, better in _ROWS
    ]
    return Report(
        title="Gradient estimators on a toy with a known gradient",
        summary=(
            "Two tokens of five, the second depends on the first; the true gradient is that of "
            "the cost over all 25 texts."
        ),
        facts=[("draws", n_draws), ("seed", seed)],
        columns=list(found),
        metric_groups=[MetricGroup("Estimators", "", rows)],
        curves=charts,
        histograms=[],
        examples=[],
        config={},
        notes=[
            "A score-function draw samples k texts, the others one.",
            "Where the text is sampled at another temperature than 1, the true gradient is that "
            "of the cost at that temperature.",
        ],
    )


def _series(swept: dict[str, list[Quality]], field: str) -> Sequence[Series]:
    x = [math.log2(tau) for tau in _TAUS]
    return [
        Series(name, x, [getattr(value, field) for value in values])
        for name, values in swept.items()
    ]


def _flat(tree: Policy) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
