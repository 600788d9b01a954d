"""Gradient estimators against enumeration: who is unbiased, who is only less noisy."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from tiny_lens import relative_error, text_logits, tiny_batch, tiny_lens, tiny_noise, tiny_spec

import gradient_report
from conlens_jax.config import LossConfig, WarmConfig
from conlens_jax.config.estimator import Estimator
from conlens_jax.lens.decoder import decoder_head, forced_states, generate
from conlens_jax.lens.estimators import condition_on_token, conditional_gumbel, token_keys
from conlens_jax.lens.gumbel import straight_through_embed
from conlens_jax.lens.objective import TERMS, Objective
from conlens_jax.lens.spec import decoder_of
from studies.lens_gradients import BLOCKS, REFERENCE, Draws, Problem, draw_blocks
from studies.lens_gradients import quality as lens_quality
from studies.toy_gradients import VOCAB, draw_gradients, make_toy, quality, true_gradient

DRAWS = 40_000


@functools.cache
def toy_gradients(estimator: Estimator, tau: float = 1.0) -> np.ndarray:
    toy, policy = make_toy(1)
    return draw_gradients(toy, policy, estimator, tau, DRAWS)


def quality_of(estimator: Estimator, tau: float = 1.0):
    return quality(toy_gradients(estimator, tau), true_gradient(*make_toy(1)))


# --- one token, a quadratic cost: everything exact ----------------------------------------------


def quadratic(seed: int = 0):
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    logits, table, square, line = array(VOCAB), array(VOCAB, 3), array(3, 3), array(3)
    cost = lambda embedded: embedded @ square @ embedded + line @ embedded
    costs = jax.vmap(cost)(table)
    truth = jax.grad(lambda logits: jax.nn.softmax(logits) @ costs)(logits)
    return logits, table, cost, truth


def expected_straight_through(tau: float, seed: int, n_draws: int = 20_000):
    """(mean over noise, its standard error); the token is chosen by the noise."""
    logits, table, cost, _ = quadratic(seed)

    @jax.jit
    @jax.vmap
    def gradient(noise):
        def loss(logits):
            token = jnp.argmax(logits + noise)[None]
            inputs = (logits[None], noise[None], token, table, jnp.float32(tau))
            return cost(straight_through_embed(*inputs)[0])

        return jax.grad(loss)(logits)

    draws = np.asarray(gradient(jax.random.gumbel(jax.random.key(seed), (n_draws, VOCAB))))
    return draws.mean(axis=0), np.sqrt(draws.var(axis=0).sum() / n_draws)


def expected_reinmax(tau: float, seed: int):
    """Over all tokens with their probability; ReinMax does not depend on the noise."""
    logits, table, cost, truth = quadratic(seed)

    def gradient(token):
        def loss(logits):
            embedded = straight_through_embed(
                logits[None],
                jnp.zeros((1, VOCAB)),
                token[None],
                table,
                jnp.float32(tau),
                estimator=Estimator("reinmax"),
            )
            return cost(embedded[0])

        return jax.grad(loss)(logits)

    return jax.nn.softmax(logits) @ jax.vmap(gradient)(jnp.arange(VOCAB)), truth


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reinmax_is_unbiased_for_a_quadratic_cost(seed):
    expected, truth = expected_reinmax(1.0, seed)
    assert relative_error(expected, truth) < 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_straight_through_is_biased_where_reinmax_is_not(seed):
    """First order against second order in the step from token to token."""
    expected, error = expected_straight_through(1.0, seed)
    _, truth = expected_reinmax(1.0, seed)
    distance = np.linalg.norm(expected - np.asarray(truth))
    assert distance > 10 * error and distance > 0.1 * np.linalg.norm(truth)


def test_reinmax_at_another_temperature_is_biased():
    expected, truth = expected_reinmax(2.0, 0)
    assert relative_error(expected, truth) > 1e-2


# --- noise given the token ----------------------------------------------------------------------


def test_conditional_gumbel_keeps_the_token_and_the_distribution():
    n = 30_000
    logits = jnp.broadcast_to(jnp.asarray([1.0, -0.5, 0.3, -2.0]), (n, 4))
    tokens = jax.random.categorical(jax.random.key(0), logits)
    keys = jax.random.split(jax.random.key(1), n)
    noisy = np.asarray(conditional_gumbel(logits, tokens, keys))
    np.testing.assert_array_equal(noisy.argmax(axis=-1), tokens)
    noise = noisy - np.asarray(logits)
    # Over tokens and draws together each entry is Gumbel(0, 1) again, independent of the others.
    np.testing.assert_allclose(noise.mean(axis=0), np.euler_gamma, atol=5 * 1.3 / math.sqrt(n))
    np.testing.assert_allclose(noise.var(axis=0), np.pi**2 / 6, rtol=0.06)
    correlation = np.corrcoef(noise.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("token", range(4))
def test_noise_conditioned_on_its_own_token_is_what_rejection_finds(token):
    """Against drawing freely and keeping the draws that chose the token: every entry's
    distribution, by the largest difference of the two (Kolmogorov–Smirnov)."""
    logits = jnp.asarray([1.0, -0.5, 0.3, -0.8])
    free, fresh = jax.random.gumbel(jax.random.key(2), (2, 60_000, 4), jnp.float32)
    accepted = np.asarray(logits[None] + free)
    accepted = accepted[accepted.argmax(axis=-1) == token]
    drawn = condition_on_token(
        jnp.broadcast_to(logits, fresh.shape), jnp.full(len(fresh), token, jnp.int32), fresh
    )
    for theirs, ours in zip(accepted.T, np.asarray(drawn).T, strict=True):
        points = np.concatenate([theirs, ours])
        below = lambda x, points=points: np.searchsorted(np.sort(x), points, "right") / len(x)
        distance = np.abs(below(theirs) - below(ours)).max()
        # 0.1 % point of the two-sample statistic, for each of 16 comparisons.
        assert distance < 2.3 * math.sqrt(1 / len(theirs) + 1 / len(ours))


# --- two tokens, the second depends on the first ------------------------------------------------


def test_toy_gradient_is_that_of_the_enumeration():
    toy, policy = make_toy(1)
    step = 1e-3
    moved = lambda sign: {**policy, "first": policy["first"].at[2].add(sign * step)}
    slope = float(toy.expected_cost(moved(1)) - toy.expected_cost(moved(-1))) / (2 * step)
    assert float(jax.grad(toy.expected_cost)(policy)["first"][2]) == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("samples", [2, 4])
def test_rloo_is_unbiased(samples):
    found = quality_of(Estimator("rloo", samples))
    assert found.bias < 2 * found.bias_noise
    assert found.cosine > 0.999


@pytest.mark.parametrize(
    "estimator", [Estimator(), Estimator("gumbel_rao", 4), Estimator("reinmax")], ids=str
)
def test_relaxed_estimators_are_biased_and_point_the_right_way(estimator):
    found = quality_of(estimator)
    assert found.bias > 10 * found.bias_noise
    assert found.cosine > 0.3


def test_gumbel_rao_has_the_mean_of_straight_through_and_less_spread():
    compared = Estimator(), Estimator("gumbel_rao", 4)
    draws = [toy_gradients(estimator, 0.5) for estimator in compared]
    means = [draw.mean(axis=0) for draw in draws]
    error = np.sqrt(sum(draw.var(axis=0) for draw in draws) / DRAWS)
    assert np.abs(means[0] - means[1]).max() < 5 * error.max()
    spreads = [quality_of(estimator, 0.5).spread for estimator in compared]
    assert quality_of(Estimator("gumbel_rao", 16), 0.5).spread < spreads[1] < 0.9 * spreads[0]


def test_sampling_sharply_is_judged_by_the_cost_of_sharp_texts():
    """The true gradient at a sampling temperature is that of a policy with logits divided by it."""
    toy, policy = make_toy(1)
    sharp = jax.tree.map(lambda x: x / 0.5, policy)
    expected = true_gradient(toy, sharp) / 0.5
    np.testing.assert_allclose(true_gradient(toy, policy, 0.5), expected, rtol=1e-4, atol=1e-6)
    draws = draw_gradients(toy, policy, Estimator(), 1.0, DRAWS, sample_tau=0.5)
    again = draw_gradients(toy, sharp, Estimator(), 2.0, DRAWS)
    # tau / s of the divided logits: the same draws, up to the derivative of the division.
    np.testing.assert_allclose(draws, again / 0.5, rtol=1e-3, atol=1e-4)


def test_more_texts_a_row_are_less_noise():
    four, two = (quality_of(Estimator("rloo", samples)) for samples in (4, 2))
    assert four.spread < 0.75 * two.spread


# --- inside the decoder -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator", [Estimator(), Estimator("reinmax"), Estimator("gumbel_rao", 2)], ids=str
)
def test_history_gradient_is_that_of_writing_token_by_token(estimator):
    chosen = {"estimator": estimator.kind, "estimator_samples": estimator.samples}
    spec = tiny_spec(**chosen, history_gradient="exact")
    trainable, frozen = tiny_lens(spec)
    batch, noise = tiny_batch(spec, frozen["original"]), tiny_noise()
    tau = jnp.float32(0.8)
    keys = token_keys(jax.random.split(jax.random.key(3), len(noise)), spec.text_len)
    target = jnp.asarray(np.random.default_rng(0).standard_normal(noise.shape), jnp.float32)
    text = generate(decoder_of(trainable, frozen), batch.activation_BD, noise, spec=spec)

    def parallel(trainable):
        decoder = decoder_of(trainable, frozen)
        logits = text_logits(decoder, batch.activation_BD, text, noise, tau, spec, keys)
        return jnp.sum(logits * target)

    def one_by_one(trainable):
        decoder = decoder_of(trainable, frozen)
        history = jnp.zeros((len(noise), spec.text_len - 1, spec.model.d_model))
        for t in range(spec.text_len):
            states = forced_states(decoder, batch.activation_BD, history, spec=spec)
            logits = decoder_head(decoder, spec).logits(states)
            if t < spec.text_len - 1:
                embedded = straight_through_embed(
                    logits[:, t],
                    noise[:, t],
                    text[:, t],
                    decoder.base["embedding"],
                    tau,
                    estimator=estimator,
                    keys=keys[:, t],
                )
                history = history.at[:, t].set(embedded)
        return jnp.sum(logits * target)

    found, oracle = (jax.jit(jax.grad(loss))(trainable) for loss in (parallel, one_by_one))
    assert relative_error(found["decoder"], oracle["decoder"]) < 1e-5


def test_scaled_noise_samples_at_that_temperature():
    """What loss.sample_tau does: the noise is multiplied by it."""
    logits = jnp.asarray([1.0, 0.0, -1.0])
    noise = 2.0 * jax.random.gumbel(jax.random.key(0), (20_000, 3), jnp.float32)
    tokens = jnp.argmax(logits[None] + noise, axis=-1)
    counted = np.bincount(np.asarray(tokens), minlength=3) / 20_000
    np.testing.assert_allclose(counted, jax.nn.softmax(logits / 2.0), atol=0.015)


# --- on a lens ----------------------------------------------------------------------------------


def test_quality_from_blocks_finds_what_the_draws_were_made_of():
    """Draws with a known mean, bias and spread, the reference with noise larger than itself."""
    rng = np.random.default_rng(0)
    size, per_block = 300, 40
    truth = np.zeros(size)
    truth[0] = 2.0
    mean = np.zeros(size)
    mean[:2] = 1.0, 1.0  # cosine √½ to the truth, distance √2

    def blocks(centre, spread):
        draws = centre + spread / math.sqrt(size) * rng.standard_normal((BLOCKS, per_block, size))
        squares = np.sum(draws**2, axis=-1)
        directions = draws / np.sqrt(squares)[..., None]
        return Draws(draws.mean(axis=1), directions.mean(axis=1), squares.mean(axis=1))

    found = lens_quality(blocks(mean, 6.0), blocks(truth, 40.0))
    expected = {
        "snr": math.sqrt(2) / 6,
        "cosine": math.sqrt(0.5),
        "one_cosine": 1.0 / math.sqrt(36 + 2),
        "size": math.sqrt(0.5),
        "bias": math.sqrt(0.5),
        "spread": 3.0,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        interval = found[name]
        assert interval.lo < value < interval.hi, (name, value, interval)
        assert interval.hi - interval.lo < value


def test_draws_on_a_lens():
    """Every draw has noise of its own, and the same when it is drawn again."""
    spec = tiny_spec()
    trainable, frozen = tiny_lens(spec)
    objective = Objective(LossConfig(), WarmConfig(before=3, after=1), spec)
    weights = {name: jnp.float32(1.0) for name in TERMS}
    batch = tiny_batch(spec, frozen["original"])
    problem = Problem(trainable, frozen, batch, objective, weights)
    draws = draw_blocks(problem, Estimator(), 1.0, 3)
    size = sum(leaf.size for leaf in jax.tree.leaves(trainable["decoder"]))
    assert draws.mean_KP.shape == (BLOCKS, size)
    assert len(np.unique(draws.square_K)) == BLOCKS
    # One draw a block: its direction has length 1, its mean is the draw itself.
    np.testing.assert_allclose(np.linalg.norm(draws.direction_KP, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.sum(draws.mean_KP**2, axis=1), draws.square_K, rtol=1e-5)
    later = draw_blocks(problem, Estimator(), 1.0, BLOCKS, first_draw=2)
    # Equal bits on a CPU; a GPU sums in another order in another program.
    np.testing.assert_allclose(later.mean_KP[:-2], draws.mean_KP[2:], rtol=1e-5, atol=1e-7)
    # The reference is made of terms that have a score function: the others are left out.
    reference = problem.with_estimator(REFERENCE)
    assert [name for name in TERMS if reference.uses(name)] == ["kl", "mse"]
    assert reference.texts_per_row == 4


# --- errors and the command line ----------------------------------------------------------------


def test_gumbel_rao_without_keys_says_so():
    logits, table, _, _ = quadratic()
    embed = lambda logits: straight_through_embed(
        logits[None],
        jnp.zeros((1, VOCAB)),
        jnp.zeros(1, jnp.int32),
        table,
        jnp.float32(1.0),
        estimator=Estimator("gumbel_rao", 2),
    ).sum()
    with pytest.raises(ValueError, match="pass one key per token"):
        jax.grad(embed)(logits)


def test_report(tmp_path, capsys):
    flags.FLAGS(["gradient_report", f"--out={tmp_path}", "--draws=50"])
    gradient_report.main()
    assert "RLOO 4" in capsys.readouterr().err
    assert "Gumbel-Rao" in (tmp_path / "gradients.html").read_text(encoding="utf-8")
    assert (tmp_path / "gradients.json").exists()
