"""What the parts of an explanation are worth, with a reader that adds up a vector for each word, so
that every reconstruction can be worked out by hand."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from conlens_jax.config import EvaluateConfig, TargetConfig, WarmConfig
from conlens_jax.data.rows import Rows
from conlens_jax.data.stream import CapturedRows
from conlens_jax.data.targets.words import context_words_only, next_words_only
from conlens_jax.evaluation.report.page import _added_sentences
from conlens_jax.evaluation.studies.word_parts import OTHERS, WordParts
from conlens_jax.evaluation.suite import Evaluated, Suite
from conlens_jax.measurement.aggregates import fve_nrm_at
from conlens_jax.measurement.bootstrap import Interval
from conlens_jax.measurement.programs import SwapEffect
from conlens_jax.measurement.runner import Explained, activation_statistics
from conlens_jax.models.tokenizer import train_word_tokenizer
from conlens_jax.training import auditor

END, SEPARATOR, GAP, FIRST_WORD, VOCABULARY = 0, 1, 2, 3, 43
N_ROWS, T = 36, 7
RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((VOCABULARY, 24)).astype(np.float32)
VECTORS[[END, SEPARATOR]] = 0


class SumOfWords:
    """Stands for a Measurer. ``parts["encoder"]`` scales what words of the context add; the KL is
    the squared distance to the activation. It keeps the last candidates."""

    spec = types.SimpleNamespace(end=END)

    def read(self, parts, frozen, texts_NT):
        return np.array([self.read_one(text, parts["encoder"]) for text in texts_NT])

    @staticmethod
    def read_one(text, scale):
        vector, weight = np.zeros(24, np.float32), 1.0
        for token in text:
            if token == END:
                break
            weight = scale if token == SEPARATOR else weight
            vector = vector + np.float32(weight) * VECTORS[token]
        return vector

    def effects(self, original, rows, candidates):
        self.candidates = dict(candidates)
        return {
            name: effect(np.sum(np.square(vectors - rows.activations_ND), axis=1))
            for name, vectors in {**candidates, "clean": rows.activations_ND}.items()
        }


def effect(kl_N):
    top = np.zeros((N_ROWS, 5), int)
    return SwapEffect(kl_N, kl_N, kl_N, top, top / 5)


def padded(texts):
    return np.array([[*text, *[END] * (T - len(text))] for text in texts], np.int32)


# One or two next words, then two of the context.
WORDS = RNG.integers(FIRST_WORD, VOCABULARY, (N_ROWS, 4))
FIRST = [row[: 1 + i % 2].tolist() for i, row in enumerate(WORDS)]
SECOND = [row[2:].tolist() for row in WORDS]
TARGET = padded([[*a, SEPARATOR, *b] for a, b in zip(FIRST, SECOND, strict=True)])
GREEDY = {
    "words": TARGET,
    "no second part": padded(FIRST),
    "gaps alone": padded([[*a, SEPARATOR, GAP] for a in FIRST]),
    # Of the next row, whose document is another.
    "made up": padded(
        [[*a, SEPARATOR, *b] for a, b in zip(FIRST, SECOND[1:] + SECOND[:1], strict=True)]
    ),
}


@pytest.fixture(scope="module")
def parts():
    measurer = SumOfWords()
    activations = measurer.read({"encoder": 1.0}, None, TARGET)
    rows = Rows(
        activations,
        np.zeros((N_ROWS, 4), np.int32),
        np.ones(N_ROWS, np.int32),
        np.full(N_ROWS, 4, np.int32),
        np.arange(N_ROWS),
        TARGET,
    )
    reference = activation_statistics(activations)
    suite = Suite.make(
        measurer, rows, reference, WarmConfig(), frozenset(), n_resamples=100, seed=0
    )
    return WordParts(suite, SEPARATOR)


def measured(parts, greedy_NT, *, audited=False):
    suite = parts.suite
    vectors = suite.measurer.read({"encoder": 1.0}, None, greedy_NT)
    actual = suite.rows.activations_ND
    mean = np.broadcast_to(suite.reference.mean_D, actual.shape)
    candidates = {"greedy": vectors, "mean": mean, "zero": 0 * mean, "other": actual[::-1]}
    effects = suite.measurer.effects(None, suite.rows, candidates)
    explained = Explained({"greedy": greedy_NT}, {"greedy": vectors})
    evaluated = Evaluated(explained, explained, effects, suite.quantities(candidates, effects), {})
    lens, frozen = {"encoder": 1.0}, {"original": None}
    if audited:
        return parts.audited(evaluated, lens, frozen, {"encoder": 0.5}, {"encoder": 0.0})
    return parts.of_lens(evaluated, lens, frozen)


def test_the_parts_of_a_text():
    tokenizer = train_word_tokenizer(["and so anna saw"], 30, (",", "|", "·"))
    (separator,), end = tokenizer.encode("|"), tokenizer.eos_id
    cut = {
        "and , so | anna ·": ("and , so", "| anna ·"),
        "and": ("and", ""),
        "| anna": ("", "| anna"),
        "and | anna saw , · so": ("and", "| anna saw , · so"),
    }
    fill = lambda texts: np.array(
        [[*tokenizer.encode(t), *[end] * (T - len(tokenizer.encode(t)))] for t in texts], np.int32
    )
    texts, expected = fill(cut), [fill(part) for part in zip(*cut.values(), strict=True)]
    np.testing.assert_array_equal(next_words_only(texts, separator, end), expected[0])
    np.testing.assert_array_equal(context_words_only(texts, separator, end), expected[1])


def test_one_part_alone_is_read_by_hand(parts):
    measured(parts, TARGET)
    found = parts.suite.measurer.candidates
    total = lambda words: sum(VECTORS[word] for word in words)
    for row in range(N_ROWS):
        others = [(row - N_ROWS * k // (OTHERS + 1)) % N_ROWS for k in range(1, OTHERS + 1)]
        assert row not in others and len(set(others)) == OTHERS
        of_others = np.mean([total(SECOND[other]) for other in others], axis=0)
        np.testing.assert_allclose(
            found["next_only"][row], total(FIRST[row]) + of_others, rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(found["context_only"][row], total(SECOND[row]), rtol=1e-5)


def test_words_of_the_context_add_what_they_say(parts):
    found = measured(parts, TARGET)
    assert found["context_adds_fve_nrm"].value == pytest.approx(
        1 - found["next_only_fve_nrm"].value, abs=1e-6
    )
    assert found["context_adds_fve_nrm"].lo > 0.1
    assert "The words of the context add" in _added_sentences(found)


@pytest.mark.parametrize("name", ["no second part", "gaps alone"])
def test_a_text_that_only_repeats_the_output_says_so(parts, name):
    """Nothing is added, to the last bit."""
    found = measured(parts, GREEDY[name])
    for metric in ("fve_nrm", "kl_frac_mean"):
        assert found[f"context_adds_{metric}"] == Interval(0.0, 0.0, 0.0)
    assert _added_sentences(found) == (
        " This text only repeats M's output: the words of the context add 0.00 [0.00, 0.00] "
        "fve_nrm and 0.00 [0.00, 0.00] kl_frac_mean to the next words alone."
    )


def test_words_that_are_made_up_add_nothing(parts):
    found = measured(parts, GREEDY["made up"])
    assert found["context_adds_fve_nrm"].hi < 0
    assert "only repeats M's output" in _added_sentences(found)


def test_the_text_is_compared_with_what_m_is_about_to_say(parts):
    """The audit encoder takes half of the context; the other has seen next words alone."""
    found, suite = measured(parts, TARGET, audited=True), parts.suite
    resultant, actual = suite.reference.resultant, suite.rows.activations_ND

    def fve(vectors):
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(actual, axis=1)
        return fve_nrm_at(np.mean(np.sum(vectors * actual, axis=1) / norms), resultant)

    next_tokens = np.array([sum(VECTORS[word] for word in first) for first in FIRST])
    half = next_tokens + 0.5 * np.array([sum(VECTORS[word] for word in words) for words in SECOND])
    assert found["next_tokens_fve_nrm"].value == pytest.approx(fve(next_tokens), abs=1e-5)
    added = fve(half) - fve(next_tokens)
    assert found["text_adds_fve_nrm"].value == pytest.approx(added, abs=1e-5)
    assert found["frozen_context_adds_fve_nrm"].lo > 0
    # The words of the context that are made up are worth less than none.
    worse = measured(parts, GREEDY["made up"], audited=True)
    assert worse["text_adds_fve_nrm"].hi < 0
    both = {**measured(parts, TARGET), **worse}
    assert "the text as the audit encoder reads it adds nothing: −" in _added_sentences(both)


def test_only_texts_with_a_separator_have_parts(parts):
    tokenizer = train_word_tokenizer(["and so"], 30, (",", "|"))
    words = TargetConfig(kind="words", separator=" |")
    assert WordParts.of(words, tokenizer, parts.suite).separator == tokenizer.encode("|")[0]
    for other in (TargetConfig(), dataclasses.replace(words, separator="")):
        assert WordParts.of(other, tokenizer, parts.suite) is None


def test_the_reader_of_next_words_sees_them_alone(parts, monkeypatch, tmp_path):
    """It is trained as the audit encoder is, on the first parts of the rows' targets."""
    calls = []
    monkeypatch.setattr(auditor, "_train_reader", lambda session, *call: calls.append(call))
    source = CapturedRows(parts.suite.rows)
    config = types.SimpleNamespace(evaluate=EvaluateConfig(audit_steps=7, audit_seed=3))
    session = types.SimpleNamespace(config=config, spec=SumOfWords.spec, caches=(source, source))
    auditor.train_next_words_reader(session, tmp_path, SEPARATOR)
    ((folder, train, _),) = calls
    assert folder == tmp_path / "next_words" / "seed3-steps7"
    assert len(train) == N_ROWS and next(train.places()).documents_N.tolist() == list(range(N_ROWS))
    found = train.rows([5, 2])
    assert found.targets_NT.tolist() == padded([FIRST[5], FIRST[2]]).tolist()
    np.testing.assert_array_equal(found.activations_ND, parts.suite.rows.activations_ND[[5, 2]])
