"""Explanations that end: losses, gradients and texts of unequal length, against plain autodiff.

The oracle treats each row alone: its own tokens up to the end, no masks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import (
    TEXT_LEN,
    plain_encoder_table,
    plain_predictions,
    plain_prompt,
    plain_reconstruction,
    plain_swap,
    plain_text,
    relative_error,
    tiny_batch,
    tiny_lens,
    tiny_noise,
    tiny_spec,
)

from conlens_jax.config import LossConfig, WarmConfig, constant
from conlens_jax.evaluation.suite import Suite
from conlens_jax.lens.decoder import generate, write_texts
from conlens_jax.lens.encoder import encode_tokens
from conlens_jax.lens.gumbel import as_noise
from conlens_jax.lens.losses import log_not_token
from conlens_jax.lens.objective import Objective, joint_loss, prepare, target_text, warm_loss
from conlens_jax.lens.spec import decoder_of, encoder_of
from conlens_jax.lens.text import last_real, real_tokens, take_places, text_lengths
from conlens_jax.measurement.programs import text_log_probs
from conlens_jax.models.transformer import forward
from conlens_jax.models.written import before_end

END, GAP = 17, 23
LENGTHS = (1, TEXT_LEN, 2, TEXT_LEN)  # of texts and targets: one ends at once, one not at all
NO_END = (1,)  # rows whose text is cut at T
BATCH = len(LENGTHS)
TAU = 0.7
WEIGHTS = {"lm": 0.3, "kl": 1.7, "mse": 0.6, "entropy": 0.2, "text": 0.4, "length": 0.05}
SIGNS = {"lm": 1, "kl": 1, "mse": 1, "entropy": -1, "text": 1, "length": 1}
PROMPTS = {"after the text": (9, 10), "none after it": ()}


def lengths_of(texts_NT) -> list[int]:
    """The number of real tokens of each text."""
    return [int(np.sum(real)) for real in np.asarray(real_tokens(jnp.asarray(texts_NT), END))]


def spec_with_end(encoder_right=(9, 10), **lens):
    spec = tiny_spec(dual_path=False, **lens)
    return dataclasses.replace(spec, end=END, gap=GAP, encoder_right=encoder_right)


def noise_that_ends(draw: int = 0) -> jax.Array:
    """Noise with which the texts have :data:`LENGTHS`, whatever the logits."""
    noise = np.array(tiny_noise(BATCH, seed=draw))
    noise[..., END] = -1e3
    for row, length in enumerate(LENGTHS):
        if row not in NO_END:
            noise[row, length - 1, END] = 1e3
    return jnp.asarray(noise)


def objective_of(spec, **loss) -> Objective:
    terms = {name: constant(value) for name, value in WEIGHTS.items()}
    values = LossConfig(**{**terms, "lm_reference": "text", "kl_horizon": 2, **loss})
    return Objective(values, WarmConfig(), spec, target="words")


@functools.cache
def case(encoder_right=(9, 10)):
    """(trainable, frozen, batch with targets of unequal length)."""
    spec = spec_with_end(encoder_right)
    trainable, frozen = tiny_lens(spec)
    batch = tiny_batch(spec, frozen["original"], BATCH)
    rng = np.random.default_rng(5)
    target = rng.integers(24, 48, (BATCH, TEXT_LEN)).astype(np.int32)
    for row, length in enumerate(LENGTHS):
        target[row, length - 1 if row not in NO_END else TEXT_LEN :] = END
    return trainable, frozen, batch.replace(target_BT=jnp.asarray(target))


# --- the oracle: one row at a time --------------------------------------------------------------


def error_of(found_D, wanted_D):
    sizes = jnp.linalg.norm(found_D), jnp.linalg.norm(wanted_D)
    cos = jnp.sum(found_D * wanted_D) / sizes[0] / sizes[1]
    return 2 - 2 * cos + (sizes[0] / sizes[1] - 1) ** 2


def plain_read(trainable, frozen, texts_NnD, activation_1D, spec, share):
    """(reconstructions, errors) of texts of n tokens, with the share of their shorter prefixes."""

    def read(n):
        found_ND = plain_reconstruction(trainable, frozen, texts_NnD[:, :n], spec)
        return found_ND, jax.vmap(error_of, (0, None))(found_ND, activation_1D[0])

    n = texts_NnD.shape[1]
    found_ND, error_N = read(n)
    if n == 1 or not share:
        return found_ND, error_N
    shorter_N = sum(read(k)[1] for k in range(1, n)) / (n - 1)
    return found_ND, (1 - share) * error_N + share * shorter_N


def plain_nll(trainable, frozen, row, ids, spec):
    """Of the tokens of a target."""
    prompt = plain_prompt(trainable, frozen, row.activation_BD, spec)
    seen = trainable["decoder"]["base"]["embedding"][ids[:-1]][None]
    logits = plain_predictions(trainable, frozen, jnp.concatenate([prompt, seen], 1), spec)
    log_p = jax.nn.log_softmax(logits[0, prompt.shape[1] - 1 :])
    return -jnp.mean(log_p[jnp.arange(len(ids)), ids])


def plain_row(trainable, frozen, row, noise_1TV, length, target, spec, share):
    """The terms of one row whose text and target have ``length`` tokens."""
    noise = noise_1TV[:, :length]
    logits, choice = plain_text(trainable, frozen, row.activation_BD, noise, jnp.float32(TAU), spec)
    table = plain_encoder_table(trainable, frozen)
    read_2nD = jnp.concatenate([choice @ table, table[target][None]])
    found_2D, error_2 = plain_read(trainable, frozen, read_2nD, row.activation_BD, spec, share)
    original, at = frozen["original"], row.positions_B[0]
    kl_of = lambda p, q: jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    log = lambda logits, n: jax.nn.log_softmax(jax.lax.dynamic_slice_in_dim(logits[0], at, n))
    clean = forward(original, row.tokens_GS, config=spec.model, mask_BS=row.mask_GS)
    swapped = plain_swap(original, row, found_2D[:1], spec)
    start = jnp.full((1, 1), spec.bos, jnp.int32)
    ids = jnp.argmax(choice, axis=-1).astype(jnp.int32)
    alone = forward(original, jnp.concatenate([start, ids[:, :-1]], 1), config=spec.model)
    log_p = jax.nn.log_softmax(logits[0])
    return {
        "mse": error_2[0],
        "kl": jnp.mean(kl_of(log(clean, 2), log(swapped, 2))),
        "lm": jnp.mean(kl_of(jax.nn.log_softmax(alone[0]), log_p)),
        "entropy": -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1)),
        "text": error_2[1] + plain_nll(trainable, frozen, row, target, spec),
        "length": plain_length(log_p[: length - 1]),
    }


def plain_length(log_p_mV):
    """The tokens of a text, m of which D could have ended before the last: n, and with a gradient
    for each of these the tokens after it."""
    goes_on_m = jnp.log(1 - jnp.exp(log_p_mV[:, END]))
    tokens_after_m = jnp.arange(len(log_p_mV), 0, -1, dtype=jnp.float32)
    price = jnp.sum(tokens_after_m * goes_on_m)
    return len(log_p_mV) + 1 + price - jax.lax.stop_gradient(price)


def plain_total(trainable, frozen, batch, noise_BTV, targets, spec, share):
    """(total, terms) and gradient."""

    @functools.partial(jax.jit, static_argnames="length")
    def of_row(trainable, row, noise_1TV, target, length):
        def total(trainable):
            inputs = (row, noise_1TV, length, target, spec, share)
            terms = plain_row(trainable, frozen, *inputs)
            return sum(SIGNS[name] * WEIGHTS[name] * terms[name] for name in terms), terms

        return jax.value_and_grad(total, has_aux=True)(trainable)

    rows = []
    for number, length in enumerate(LENGTHS):
        row = jax.tree.map(lambda leaf, n=number: leaf[n : n + 1], batch)
        noise_1TV = noise_BTV[number : number + 1]
        rows.append(of_row(trainable, row, noise_1TV, jnp.asarray(targets[number]), length))
    return jax.tree.map(lambda *values: sum(values) / len(values), *rows)


# --- losses and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize(("encoder_right", "share"), [((9, 10), 0.0), ((), 0.3)], ids=str)
def test_losses_and_gradients_equal_those_of_each_row_alone(encoder_right, share):
    trainable, frozen, batch = case(encoder_right)
    spec, noise = spec_with_end(encoder_right), noise_that_ends()
    objective = objective_of(spec, prefix_share=share)
    weights = {name: jnp.float32(value) for name, value in WEIGHTS.items()}

    @jax.jit
    def ours(trainable):
        prepared = prepare(trainable, frozen, batch, noise, objective=objective)
        loss = functools.partial(joint_loss, objective=objective)
        found = jax.value_and_grad(loss, has_aux=True)(
            trainable, frozen, batch, prepared, weights, jnp.float32(TAU)
        )
        return prepared.text_BT, found

    text, ((total, terms), gradient) = ours(trainable)
    assert lengths_of(text) == list(LENGTHS)
    target_NT = np.asarray(batch.target_BT)
    targets = [t[:n] for t, n in zip(target_NT, lengths_of(target_NT), strict=True)]
    assert [len(target) for target in targets] == list(LENGTHS)
    (expected, expected_terms), expected_gradient = plain_total(
        trainable, frozen, batch, noise, targets, spec, share
    )
    for name, value in expected_terms.items():
        assert terms[name] == pytest.approx(float(value), rel=1e-5), name
    assert total == pytest.approx(float(expected), rel=1e-5)
    assert relative_error(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("estimator", ["gumbel_rao", "rloo"])
def test_nothing_after_the_end_matters(estimator):
    """Other tokens and other noise after the end change neither loss nor gradient."""
    trainable, frozen, batch = case()
    spec = spec_with_end(estimator=estimator, estimator_samples=2)
    objective = objective_of(spec)
    weights = {name: jnp.float32(value) for name, value in WEIGHTS.items()}
    k = objective.texts_per_row
    noise = jnp.repeat(noise_that_ends(), k, axis=0)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), BATCH * k)

    @jax.jit
    def run(noise, replaced):
        prepared = prepare(trainable, frozen, batch, noise, keys, objective=objective)
        after = ~real_tokens(prepared.text_BT, END)
        text = jnp.where(after & replaced, 5, prepared.text_BT)
        loss = functools.partial(joint_loss, objective=objective)
        return jax.value_and_grad(loss, has_aux=True)(
            *(trainable, frozen, batch, prepared._replace(text_BT=text)),
            *(weights, jnp.float32(TAU)),
        )

    (total, _), gradient = run(noise, False)
    after = np.arange(TEXT_LEN)[None] >= np.repeat(LENGTHS, k)[:, None]
    other = jnp.where(
        jnp.asarray(after)[..., None], noise + 3.0 * tiny_noise(BATCH * k, seed=9), noise
    )
    (same_total, _), same = run(other, True)
    assert same_total == pytest.approx(float(total), rel=1e-6)
    assert relative_error(same, gradient) < 1e-6
    # A change before the end does matter.
    (changed, _), _ = run(noise.at[:, 0, 30].add(2e3), False)
    assert abs(float(changed - total)) > 1e-3


def test_the_warm_start_reads_and_writes_targets_with_gaps():
    trainable, frozen, batch = case()
    spec = spec_with_end()
    objective = dataclasses.replace(
        objective_of(spec), warm=WarmConfig(gap_rate=0.5), marks=(30, 31)
    )
    keys = jax.random.split(jax.random.key(1, impl="threefry2x32"), BATCH)
    target = np.asarray(batch.target_BT).copy()
    target[0, 0] = 30
    many = batch.replace(target_BT=jnp.asarray(target))
    found = np.asarray(target_text(many, keys, objective))
    changed = found != target
    assert (found[changed] == GAP).all()
    words = ~np.isin(target, (END, 30, 31))
    assert 0 < changed.sum() < words.sum() and not changed[~words].any()
    np.testing.assert_array_equal(target_text(many, None, objective), target)
    # The loss is that of the replaced targets.
    given = batch.replace(target_BT=jnp.asarray(found))
    ours = jax.jit(functools.partial(warm_loss, objective=objective))
    total, _ = ours(trainable, frozen, many, keys)
    expected, _ = ours(trainable, frozen, given, None)
    assert total == pytest.approx(float(expected), rel=1e-6)
    # Only after a separator, where there is one.
    later = dataclasses.replace(objective, gaps_after=31)
    target[1, 1] = 31
    marked = batch.replace(target_BT=jnp.asarray(target))
    after = np.cumsum(target == 31, axis=1) > 0
    np.testing.assert_array_equal(
        target_text(marked, keys, later),
        np.where(after, target_text(marked, keys, objective), target),
    )
    assert (np.asarray(target_text(marked, keys, later)) != target)[1].any()


# --- writing and reading ------------------------------------------------------------------------


def test_a_text_is_filled_up_with_its_end():
    trainable, frozen, batch = case()
    spec = spec_with_end()
    text = np.asarray(
        jax.jit(functools.partial(generate, spec=spec))(
            decoder_of(trainable, frozen), batch.activation_BD, noise_that_ends()
        )
    )
    without = np.asarray(
        jax.jit(functools.partial(generate, spec=dataclasses.replace(spec, end=None)))(
            decoder_of(trainable, frozen), batch.activation_BD, noise_that_ends()
        )
    )
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(text[row, :length], without[row, :length])
        assert (text[row, length:] == END).all()
    assert (without[0, 1:] != END).any()
    shown = [before_end(row, END) for row in text]
    assert [len(tokens) for tokens in shown] == [
        length - (row not in NO_END) for row, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("encoder_right", PROMPTS.values(), ids=PROMPTS)
def test_the_encoder_reads_up_to_the_end(encoder_right):
    trainable, frozen, batch = case(encoder_right)
    spec = spec_with_end(encoder_right)
    read = jax.jit(lambda text: encode_tokens(encoder_of(trainable, frozen, spec), text, spec=spec))
    text = np.asarray(batch.target_BT)
    found = read(text)
    for row, length in enumerate(lengths_of(text)):
        alone = read(text[row : row + 1, :length])
        np.testing.assert_allclose(found[row], alone[0], rtol=0, atol=1e-5)


def test_real_tokens_by_hand():
    texts = np.array([[END, 1, END], [1, END, 2], [1, 2, 3], [1, 2, END]], np.int32)
    mask = np.asarray(real_tokens(jnp.asarray(texts), END))
    np.testing.assert_array_equal(mask, [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    mask = jnp.asarray(mask)
    np.testing.assert_array_equal(last_real(mask), [0, 1, 2, 2])
    assert [before_end(text, END) for text in texts] == [(), (1,), (1, 2, 3), (1, 2)]
    assert before_end(texts[0], None) == (END, 1, END)
    values = jnp.arange(24.0).reshape(4, 3, 2)
    taken = values[jnp.arange(4), last_real(mask)]
    np.testing.assert_array_equal(take_places(values, last_real(mask)), taken)
    np.testing.assert_array_equal(take_places(values[..., 0], last_real(mask)), taken[:, 0])
    assert real_tokens(jnp.asarray(texts), None) is None


def test_lengths_of_texts_and_those_that_are_cut():
    texts = np.array([[END, 1, END], [1, END, 2], [1, 2, 3], [1, 2, END]])
    suite = object.__new__(Suite)
    for end, expected in ((END, {"a.tokens": [0, 1, 3, 2], "a.cut": [0, 0, 1, 0]}), (None, {})):
        measurer = types.SimpleNamespace(spec=dataclasses.replace(tiny_spec(), end=end))
        object.__setattr__(suite, "measurer", measurer)
        found = {name: value.tolist() for name, value in suite.lengths(texts, "a").items()}
        assert found == expected


def test_the_gradient_of_the_length_is_unbiased():
    """Over all texts of a small vocabulary, each with its probability, the gradient is that of the
    expected length by D's choice to end after each prefix."""
    end, words, most = 0, (1, 2), 3
    prefixes = [p for n in range(most) for p in itertools.product(words, repeat=n)]
    rng = np.random.default_rng(0)
    ends = jnp.asarray(rng.normal(size=len(prefixes)), jnp.float32)  # a logit of each prefix
    first_word = rng.uniform(0.2, 0.8, len(prefixes))  # its probability, if D goes on
    texts = [(*p, end) for p in prefixes] + list(itertools.product(words, repeat=most))

    def probability(ends, text):
        p = 1.0
        for place, token in enumerate(text):
            index = prefixes.index(text[:place])
            p_end = jax.nn.sigmoid(ends[index])
            p *= p_end if token == end else 1 - p_end
            if token != end:
                p *= first_word[index] if token == words[0] else 1 - first_word[index]
        return p

    def expected(ends):
        return sum(probability(ends, text) * len(text) for text in texts)

    def estimated(ends, text):
        padded = jnp.asarray([[*text, *[end] * (most - len(text))]])
        places = [prefixes.index(text[:n]) for n in range(len(text))]
        logits = jnp.zeros((1, most)).at[0, : len(text)].set(ends[jnp.asarray(places)])
        goes_on = jax.nn.log_sigmoid(-logits)
        return text_lengths(goes_on, real_tokens(padded, end))[0]

    assert sum(float(probability(ends, text)) for text in texts) == pytest.approx(1, abs=1e-6)
    found = sum(probability(ends, text) * jax.grad(estimated)(ends, text) for text in texts)
    np.testing.assert_allclose(found, jax.grad(expected)(ends), rtol=0, atol=1e-6)
    assert [float(estimated(ends, text)) for text in texts] == [len(text) for text in texts]


def test_going_on_is_exact_where_the_end_is_almost_sure():
    logits = jnp.asarray([30.0, 0.0, 0.0])
    assert log_not_token(logits, 0) == pytest.approx(np.log(2) - 30, rel=1e-6)
    assert log_not_token(logits, 1) == pytest.approx(0.0, abs=1e-6)
    gradient = jax.grad(lambda logits: log_not_token(logits, 0))(logits)
    np.testing.assert_allclose(gradient, [-1, 0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("noise", ["none", "ends", "ends early"])
def test_texts_to_read_are_the_generated_ones_with_their_probabilities(ends, noise):
    """They stop when all have ended; the probabilities are those of one parallel pass."""
    trainable, frozen, batch = case()
    spec = spec_with_end() if ends else tiny_spec(dual_path=False)
    decoder = decoder_of(trainable, frozen)
    noise_BTV = {
        "none": None,
        "ends": noise_that_ends(),
        "ends early": noise_that_ends().at[:, 1, END].set(1e4),
    }[noise]
    given = None if noise_BTV is None else as_noise(noise_BTV)
    text, log_p = jax.jit(functools.partial(write_texts, spec=spec))(
        decoder, batch.activation_BD, given
    )
    expected = generate(decoder, batch.activation_BD, noise_BTV, spec=spec)
    np.testing.assert_array_equal(text, expected)
    forced = text_log_probs(trainable, frozen, batch.activation_BD, text, spec=spec)
    real = real_tokens(text, spec.end)
    forced = forced if real is None else jnp.where(real, forced, 0.0)
    np.testing.assert_allclose(log_p, forced, rtol=1e-5, atol=1e-5)
