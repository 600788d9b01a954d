"""Measuring a lens: rows stay apart, controls use other documents, a known lens is recognised."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import CONTEXT, TEXT_LEN, captured, plain_swap, plain_text, tiny_lens, tiny_spec
from tiny_models import random_tokens

from conlens_jax.config import WarmConfig
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.suite import HEADLINE, Suite
from conlens_jax.lens.batch import Batch
from conlens_jax.lens.decoder import generate
from conlens_jax.lens.gumbel import Purpose, drawn_noise, example_keys
from conlens_jax.lens.spec import decoder_of
from conlens_jax.measurement import metrics
from conlens_jax.measurement.programs import TOP
from conlens_jax.measurement.runner import Explained, Measurer, activation_statistics, other_rows
from conlens_jax.models.transformer import forward
from conlens_jax.parallel.mesh import single_device_mesh

N_ROWS, HORIZON, SEED = 10, 3, 4
WARM = WarmConfig(before=3, after=1)
SPEC = tiny_spec()


@pytest.fixture(scope="module")
def lens():
    return tiny_lens(SPEC)


@pytest.fixture(scope="module")
def rows(lens):
    """Right-padded contexts of unequal length; one position is nearer the start than a window."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(CONTEXT - 2, CONTEXT + 1, N_ROWS).astype(np.int32)
    positions = rng.integers(3, lengths - 3).astype(np.int32)
    positions[0] = 1
    mask = np.arange(CONTEXT) < lengths[:, None]
    tokens = np.where(mask, random_tokens(N_ROWS, CONTEXT), 0).astype(np.int32)
    states = np.array(captured(lens[1]["original"], tokens, mask, spec=SPEC))
    activations = states[np.arange(N_ROWS), positions]
    documents = np.array([7, 7, 3, 3, 9, 9, 1, 4, 4, 5])
    return Rows(activations, tokens, positions, lengths, documents)


@functools.cache
def measurer_for(batch_size: int) -> Measurer:
    mesh = single_device_mesh()
    measurer = Measurer(SPEC, mesh, horizon=HORIZON, batch_size=batch_size, seed=SEED)
    for name, value in vars(measurer).items():
        if hasattr(value, "lower"):  # a jitted function: the same, compiled fast
            setattr(measurer, name, jax.jit(value.__wrapped__))
    return measurer


@pytest.fixture(scope="module")
def measurer():
    return measurer_for(N_ROWS)


@pytest.fixture(scope="module")
def random_vectors():
    return np.random.default_rng(1).standard_normal((N_ROWS, 32)).astype(np.float32)


# --- the measurer -------------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_batch_size(lens, rows, random_vectors):
    """Neither the last, filled-up batch nor the place of a row in its batch is seen."""
    results = []
    for batch_size in (N_ROWS, 4):
        measurer = measurer_for(batch_size)
        explained = measurer.explain(*lens, rows)
        texts = explained.texts["greedy"]
        effects = measurer.effects(lens[1]["original"], rows, {"random": random_vectors})
        numbers = [measurer.read(*lens, texts), measurer.text_nll(lens[1]["original"], texts)]
        results.append((explained.texts, [explained.reconstructions, effects, numbers]))
    (texts, numbers), (other_texts, other_numbers) = results
    jax.tree.map(np.testing.assert_array_equal, other_texts, texts)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, other_numbers, numbers)
    assert all(len(leaf) == N_ROWS for leaf in jax.tree.leaves(numbers))


def test_weights_are_not_copied_to_the_devices_with_every_batch(lens, rows, measurer):
    on_host = jax.tree.map(np.asarray, lens[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        measurer.explain(on_host, lens[1], rows)


def test_texts_are_the_decoders(lens, rows, measurer):
    """Sampled with noise of their own, apart from training's; and greedily."""
    write = jax.jit(
        lambda noise: generate(
            decoder_of(*lens), jnp.asarray(rows.activations_ND), noise, spec=SPEC
        )
    )
    keys = example_keys(
        SEED, jnp.int32(0), jnp.arange(N_ROWS, dtype=jnp.int32), Purpose.MEASURED_TEXT
    )
    noise = drawn_noise(keys, TEXT_LEN).values(48)
    explained = measurer.explain(*lens, rows)
    np.testing.assert_array_equal(explained.texts["sampled"], write(noise))
    np.testing.assert_array_equal(explained.texts["greedy"], write(jnp.zeros_like(noise)))
    assert np.any(explained.texts["sampled"] != explained.texts["greedy"])
    for decoding, texts in explained.texts.items():
        read = measurer.read(*lens, texts)
        np.testing.assert_allclose(explained.reconstructions[decoding], read, rtol=0, atol=1e-5)


def test_log_probabilities_are_those_of_decoding_step_by_step(lens, rows, measurer):
    activation_BD = jnp.asarray(rows.activations_ND)
    greedy = jnp.zeros((N_ROWS, TEXT_LEN, 48), jnp.float32)
    logits, choices = jax.jit(functools.partial(plain_text, spec=SPEC))(
        *lens, activation_BD, greedy, 1.0
    )
    texts = np.asarray(jnp.argmax(choices, axis=-1), np.int32)
    expected = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), texts[..., None], axis=-1
    )[..., 0]
    found = measurer.text_log_probs(*lens, rows, texts)
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_effects_equal_the_full_forward(lens, rows, measurer, random_vectors):
    original = lens[1]["original"]
    effects = measurer.effects(original, rows, {"random": random_vectors})
    places = (rows.activations_ND, rows.tokens_NS, rows.lengths_N, rows.positions_N)
    batch = Batch(*map(jnp.asarray, places), jnp.arange(N_ROWS, dtype=jnp.int32))
    run = jax.jit(lambda original, vectors: plain_swap(original, batch, vectors, SPEC))
    row = np.arange(N_ROWS)
    window = rows.positions_N[:, None] + np.arange(HORIZON)
    next_token = rows.tokens_NS[row, rows.positions_N + 1]

    def log_p(vectors):
        logits = np.asarray(run(original, vectors), np.float64)[row[:, None], window]
        return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))

    true = log_p(rows.activations_ND)
    for name, vectors in (("clean", rows.activations_ND), ("random", random_vectors)):
        found, effect = log_p(vectors), effects[name]
        kl = np.sum(np.exp(true) * (true - found), axis=-1)
        np.testing.assert_allclose(effect.kl_at, kl[:, 0], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(effect.kl_cont, kl.mean(axis=1), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(effect.ce, -found[row, 0, next_token], rtol=1e-4)
        order = np.argsort(-found[:, 0], axis=-1)[:, :TOP]
        np.testing.assert_array_equal(effect.top_tokens, order)
        expected = np.exp(np.take_along_axis(found[:, 0], order, axis=-1))
        np.testing.assert_allclose(effect.top_probabilities, expected, rtol=1e-4)
    assert effects["random"].kl_at.min() > 1e-3


def test_text_nll_is_that_of_the_model_alone(lens, rows, measurer):
    texts = rows.tokens_NS[:, :TEXT_LEN]
    tokens = np.concatenate([np.full((N_ROWS, 1), SPEC.bos, np.int32), texts], axis=1)
    run = jax.jit(lambda original: forward(original, tokens, config=SPEC.model))
    logits = np.asarray(run(lens[1]["original"]), np.float64)[:, :-1]
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_p, texts[..., None], axis=-1).mean(axis=(1, 2))
    np.testing.assert_allclose(measurer.text_nll(lens[1]["original"], texts), expected, rtol=1e-4)


def test_odds_are_differences_of_log_probabilities(lens, rows, measurer, random_vectors):
    """Of the most likely pair, whose probabilities the effects hold."""
    original, candidates = lens[1]["original"], {"random": random_vectors}
    effect = measurer.effects(original, rows, candidates)["random"]
    pairs = effect.top_tokens[:, :2]
    odds = measurer.odds(original, rows, candidates, pairs)["random"]
    assert odds.shape == (N_ROWS, HORIZON)
    expected = np.log(effect.top_probabilities[:, 1] / effect.top_probabilities[:, 0])
    np.testing.assert_allclose(odds[:, 0], expected, rtol=1e-3, atol=1e-5)
    swapped = measurer.odds(original, rows, candidates, pairs[:, ::-1])["random"]
    np.testing.assert_allclose(swapped, -odds, rtol=1e-6)


def test_other_draws_are_other_texts(lens, rows, measurer):
    """Draw 0 is the sampled text, and each is read by the lens's own encoder."""
    explained = measurer.explain(*lens, rows)
    first, _ = measurer.sample(*lens, rows, 0)
    np.testing.assert_array_equal(first, explained.texts["sampled"])
    second, reconstructions = measurer.sample(*lens, rows, 1)
    assert np.any(second != first)
    np.testing.assert_allclose(reconstructions, measurer.read(*lens, second), rtol=0, atol=1e-5)


def test_last_states_unembed_to_the_models_own_prediction(lens, rows, measurer):
    original = lens[1]["original"]
    states = measurer.last_states(original, rows)
    effect, words = measurer.unembedded(original, rows, states)
    np.testing.assert_allclose(effect.kl_at, 0.0, atol=1e-5)
    clean = measurer.effects(original, rows, {})["clean"]
    np.testing.assert_array_equal(words, clean.top_tokens[:, :TEXT_LEN])
    logit_lens, _ = measurer.unembedded(original, rows, rows.activations_ND)
    assert logit_lens.kl_at.min() > 1e-3


def test_continuations_are_the_models_greedy_ones(lens, rows, measurer):
    """Token by token, each from the whole context up to P."""
    original, n_new = lens[1]["original"], 2
    found = measurer.continuations(original, rows, n_new)
    forward_jit = jax.jit(functools.partial(forward, config=SPEC.model))
    # Room for the new tokens behind the longest context.
    tokens = np.pad(rows.tokens_NS, ((0, 0), (0, n_new)))
    row = np.arange(N_ROWS)
    for step in range(n_new):
        logits = np.asarray(forward_jit(original, tokens))
        written = logits[row, rows.positions_N + step].argmax(axis=-1)
        np.testing.assert_array_equal(found[:, step], written)
        tokens[row, rows.positions_N + 1 + step] = written


# --- pairing and references ---------------------------------------------------------------------


def test_partner_is_a_row_of_another_document():
    rng = np.random.default_rng(0)
    for n_rows in (2, 3, 10, 51):
        documents = rng.permutation(np.arange(n_rows) // max(n_rows // 6, 1))
        partner = other_rows(documents)
        assert np.all(documents[partner] != documents)
        # Each row is another's partner once, so that the control has the same texts.
        np.testing.assert_array_equal(np.sort(partner), np.arange(n_rows))
    half = np.array([1, 2, 1, 2])
    assert np.all(half[other_rows(half)] != half)


@pytest.mark.parametrize("documents", [[5, 5, 5], [5], [5, 5, 5, 1, 2], [1, 5, 5]])
def test_too_few_documents(documents):
    with pytest.raises(ValueError, match="too few documents.*dump.n_validation_samples"):
        other_rows(np.array(documents))


def test_reference_statistics():
    rng = np.random.default_rng(0)
    activations = (3 * rng.standard_normal((50, 6)) + rng.standard_normal(6)).astype(np.float32)
    reference = activation_statistics(activations)
    wide = activations.astype(np.float64)
    np.testing.assert_allclose(reference.mean_D, wide.mean(axis=0), rtol=1e-5)
    assert reference.scale == pytest.approx(np.sqrt(wide.var(axis=0).mean()))
    units = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    assert reference.resultant == pytest.approx(np.linalg.norm(units.mean(axis=0)))
    assert reference.n_rows == 50
    norms = np.linalg.norm(wide, axis=1)
    assert reference.norms == pytest.approx(np.quantile(norms, [0.001, 0.999]))


# --- the suite ----------------------------------------------------------------------------------


class KnownLens(Measurer):
    """Hands back the vector it is given, under given texts; remembers what it was made to read."""

    def __init__(self, measurer: Measurer, texts_NT: np.ndarray):
        self.__dict__ |= measurer.__dict__
        self.texts_NT, self.read_texts = texts_NT, []

    def explain(self, trainable, frozen, rows):
        vectors = np.array(rows.activations_ND)
        return Explained(
            texts={"greedy": self.texts_NT, "sampled": self.texts_NT},
            reconstructions={"greedy": vectors, "sampled": vectors},
        )

    def read(self, trainable, frozen, texts_NT):
        self.read_texts.append(texts_NT)
        return np.ones((len(texts_NT), 32), np.float32)


def suite_with(measurer, rows, attribute_ids=frozenset()):
    return Suite.make(
        measurer,
        rows,
        activation_statistics(rows.activations_ND),
        WARM,
        attribute_ids,
        n_resamples=40,
        seed=0,
    )


@pytest.fixture(scope="module")
def known(lens, rows, measurer):
    """(suite, its evaluation, the lens): a perfect lens whose text says what M predicts."""
    clean = measurer.effects(lens[1]["original"], rows, {})["clean"]
    texts = np.repeat(clean.top_tokens[:, :1], TEXT_LEN, axis=1)
    perfect = KnownLens(measurer, texts)
    suite = suite_with(perfect, rows, attribute_ids=frozenset(range(48)))
    return suite, suite.evaluate(*lens), perfect


def test_a_perfect_lens_has_perfect_values(known):
    values = {name: interval.value for name, interval in known[1].metrics.items()}
    for prefix in ("", "sampled_"):
        for name in ("cos", "fve_nrm", "fve_raw", "top1_agree"):
            assert values[prefix + name] == pytest.approx(1.0, abs=1e-6), name
        for name in ("kl_frac_mean", "kl_frac_zero", "kl_frac_other", "ce_rec"):
            assert values[prefix + name] == pytest.approx(1.0, abs=1e-3), name
        assert abs(values[prefix + "kl_at"]) < 1e-4 and abs(values[prefix + "kl_cont"]) < 1e-4
    assert abs(values["kl_floor"]) < 1e-4
    assert min(values["kl_mean"], values["kl_zero"], values["kl_other"]) > 1e-3


def test_the_decoder_without_its_vector_gets_the_mean(known):
    """Here the lens hands on what it is given, so this control is the mean itself."""
    values = {name: interval.value for name, interval in known[1].metrics.items()}
    for prefix in ("null_novec_", "null_novec_sampled_"):
        assert values[prefix + "kl_at"] == values["kl_mean"]
        for name in ("kl_frac_mean", "fve_raw", "ce_rec"):
            assert values[prefix + name] == pytest.approx(0.0, abs=1e-6), name


def test_the_shuffled_control_reads_another_document(known, rows):
    suite, evaluated, _ = known
    values = {name: interval.value for name, interval in evaluated.metrics.items()}
    partner = suite.partner_N
    assert np.all(rows.documents_N[partner] != rows.documents_N)
    cos = metrics.cosine(rows.activations_ND[partner], rows.activations_ND)
    assert cos.mean() < 0.9
    for prefix in ("null_shuffle_", "null_shuffle_sampled_"):
        assert values[prefix + "cos"] == pytest.approx(cos.mean())
        # The perfect lens's other vector is the reference "other" itself.
        assert values[prefix + "kl_at"] == values["kl_other"]
        assert values[prefix + "kl_frac_other"] == 0
    about_to_use = evaluated.effects["clean"].top_tokens[:, 0]
    same = np.mean(about_to_use[partner] == about_to_use)
    assert same < 1
    for prefix in ("", "sampled_"):
        assert values[prefix + "attribute_stated"] == 1
        assert values[prefix + "null_shuffle_attribute_stated"] == pytest.approx(same)


def test_true_text_controls_read_the_tokens_around_the_position(known, rows):
    last_tokens, window = known[2].read_texts
    for row, position in enumerate(rows.positions_N):
        at = lambda offset: rows.tokens_NS[row, max(position + offset, 0)]  # noqa: B023
        assert last_tokens[row].tolist() == [at(offset) for offset in (-3, -2, -1, 0)]
        assert window[row].tolist() == [at(offset) for offset in (-2, -1, 0, 1)]


def test_metrics_of_a_real_lens(lens, rows, measurer):
    suite = suite_with(measurer, rows)
    evaluated = suite.evaluate(*lens)
    no_interval = {"distinct_2", "sampled_distinct_2"}
    for name, interval in evaluated.metrics.items():
        assert np.isfinite(interval.value), name
        assert name in no_interval or interval.lo <= interval.hi, name
    assert "attribute_stated" not in evaluated.metrics  # the corpus has no attributes
    per_row, values = evaluated.per_row, evaluated.metrics
    assert all(array.shape == (N_ROWS,) for array in per_row.values())
    for reference in ("mean", "zero", "other"):
        # A ratio of means, not a mean of ratios.
        expected = 1 - per_row["greedy.kl_at"].mean() / per_row[f"{reference}.kl_at"].mean()
        assert values[f"kl_frac_{reference}"].value == pytest.approx(expected)
    actual = rows.activations_ND.astype(np.float64)
    found = evaluated.explained.reconstructions["greedy"].astype(np.float64)
    spread = np.sum((actual - actual.mean(axis=0)) ** 2)
    assert values["fve_raw"].value == pytest.approx(1 - np.sum((found - actual) ** 2) / spread)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (actual, found)]
    resultant = np.linalg.norm(units[0].mean(axis=0))
    error = np.sum((units[0] - units[1]) ** 2, axis=1).mean()
    assert values["fve_nrm"].value == pytest.approx(1 - error / (1 - resultant**2))
    same = suite.differences(evaluated, evaluated)
    assert set(same) == set(HEADLINE)
    assert all(interval.value == interval.lo == interval.hi == 0 for interval in same.values())
