"""Audit and interventions on a lens whose reader is known: a bag of words.

The reconstruction is the sum of a random vector for each word, the activation that of the true
text, and M's odds are differences of counts. So what each change must do can be worked out by hand.
"""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from conlens_jax.config import WarmConfig
from conlens_jax.corpora.statements import TokenVariable
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.claims import NEXT, Claim
from conlens_jax.evaluation.studies.audit import audit_lens
from conlens_jax.evaluation.studies.interventions import (
    draw_next_word_edits,
    intervene,
    intervene_on_next_words,
)
from conlens_jax.evaluation.studies.text_changes import DROPPED, Lexicon
from conlens_jax.evaluation.suite import Evaluated, Suite
from conlens_jax.measurement.programs import SwapEffect
from conlens_jax.measurement.runner import Explained, activation_statistics

N_ROWS, TEXT_LEN, VOCABULARY = 24, 6, 40
RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((VOCABULARY, 16)).astype(np.float32)
PUNCTUATION, SYNONYM = 39, 38
"""The mark says nothing; the last words but one mean what the word 0 means."""
VECTORS[PUNCTUATION] = 0
VECTORS[SYNONYM] = VECTORS[0]
ANIMALS = np.arange(5, 10)


def bag(tokens_NT, lengths_N):
    """Counts of the first tokens, [N, V]."""
    counts = np.zeros((len(tokens_NT), VOCABULARY))
    for row, length in enumerate(lengths_N):
        np.add.at(counts[row], tokens_NT[row, :length], 1)
    return counts


@dataclasses.dataclass
class BagOfWords:
    """Stands for a Measurer. ``parts["encoder"]`` is the share of each word that a reader gets, so
    that 1 reads all; reconstructions have the counts behind the vectors, for the odds."""

    spec = types.SimpleNamespace(end=None)

    def read(self, parts, frozen, tokens_NT, lengths_N=None):
        if lengths_N is None:
            lengths_N = np.full(len(tokens_NT), tokens_NT.shape[1])
        counts = bag(tokens_NT, lengths_N)
        known = np.where(np.arange(VOCABULARY) < parts["encoder"] * VOCABULARY, 1, 0)
        return np.concatenate([counts * known @ VECTORS, 1e-9 * counts], axis=1)

    def effects(self, original, rows, candidates):
        """KL is the squared distance to the activation."""
        return {
            name: effect(np.sum((vectors - rows.activations_ND) ** 2, axis=1))
            for name, vectors in {**candidates, "clean": rows.activations_ND}.items()
        }

    def odds(self, original, rows, candidates, pairs_N2):
        row = np.arange(len(rows))
        count = lambda vectors, column: 1e9 * vectors[row, 16 + pairs_N2[:, column]]
        return {
            name: np.repeat((count(v, 1) - count(v, 0))[:, None], 2, axis=1)
            for name, v in candidates.items()
        }


def effect(kl_N):
    top = np.zeros((N_ROWS, 5), int)
    return SwapEffect(kl_N, kl_N, kl_N, top, top / 5)


@pytest.fixture(scope="module")
def texts():
    """Two plain words, an animal, a mark, a word with a synonym, an animal again in every other."""
    texts = RNG.integers(10, 38, (N_ROWS, TEXT_LEN))
    texts[:, 2], texts[:, 3], texts[:, 4] = RNG.choice(ANIMALS, N_ROWS), PUNCTUATION, 0
    texts[::2, 5] = texts[::2, 2]
    return texts.astype(np.int32)


@pytest.fixture(scope="module")
def suite(texts):
    activations = BagOfWords().read({"encoder": 1}, None, texts).astype(np.float32)
    rows = Rows(
        activations,
        np.tile(texts, (1, 2)),
        np.full(N_ROWS, TEXT_LEN, np.int32),
        np.full(N_ROWS, 2 * TEXT_LEN, np.int32),
        np.arange(N_ROWS, dtype=np.int64) // 2,
    )
    warm = WarmConfig(before=TEXT_LEN, after=0)
    reference = activation_statistics(activations)
    return Suite.make(BagOfWords(), rows, reference, warm, frozenset(), n_resamples=50, seed=0)


@pytest.fixture(scope="module")
def evaluated(suite, texts):
    vectors = suite.measurer.read({"encoder": 1}, None, texts)
    explained = Explained(
        {"greedy": texts, "sampled": texts}, {"greedy": vectors, "sampled": vectors}
    )
    mean = np.broadcast_to(suite.reference.mean_D, vectors.shape)
    candidates = {"mean": mean, "zero": 0 * vectors, "other": vectors[suite.partner_N]}
    effects = suite.measurer.effects(None, suite.rows, candidates)
    # M is about to say the animal in the first half of the rows.
    effects["clean"].top_tokens[: N_ROWS // 2, 0] = texts[: N_ROWS // 2, 2]
    per_row = suite.quantities(candidates, effects)
    return Evaluated(explained, explained, effects, per_row, {})


@pytest.fixture(scope="module")
def audited(suite, evaluated):
    ids = np.arange(VOCABULARY)
    lexicon = Lexicon(
        starts_word=np.ones(VOCABULARY, bool),
        is_punctuation=ids == PUNCTUATION,
        synonym=np.where(ids == 0, SYNONYM, ids).astype(np.int32),
    )
    lens, frozen, auditor = {"encoder": 1.0}, {"original": None}, {"encoder": 0.5}
    found = audit_lens(suite, evaluated, lens, frozen, auditor, lexicon, seed=0)
    return {name: interval.value for name, interval in found.items()}


@pytest.mark.parametrize("name", ["shuffle_words", "no_punctuation", "synonyms"])
def test_a_bag_of_words_survives_what_keeps_its_words(audited, name):
    assert audited[f"{name}_rows"] == pytest.approx(1, abs=0.05)
    assert audited[f"{name}_retention"] == pytest.approx(1, abs=1e-5)
    assert audited[f"{name}_kl_retention"] == pytest.approx(1, abs=1e-5)
    assert audited[f"{name}_fve_nrm"] == pytest.approx(1, abs=1e-5)


def test_it_does_not_survive_missing_words(audited):
    assert audited["drop_25_retention"] < 0.95
    assert audited["drop_25_kl_retention"] < 0.95
    left = [audited[f"drop_{percent}_fve_nrm"] for percent in DROPPED]
    assert left == sorted(left, reverse=True) and left[-1] < left[0]
    at = [audited[f"fve_nrm_at_{k}"] for k in (1, 2, 4, TEXT_LEN)]
    assert at == sorted(at) and at[0] < 0.6 and at[-1] == pytest.approx(1, abs=1e-5)
    assert audited["tokens_to_half"] == next(
        k for k, fve in zip((1, 2, 4, TEXT_LEN), at, strict=True) if fve >= 0.5 * at[-1]
    )


def test_a_reader_of_half_the_words_has_a_gap(audited):
    """On true text just as much: it is a worse reader, and the text no code."""
    assert audited["frozen_fve_nrm"] < 0.9
    assert audited["gap_frozen"] == pytest.approx(1 - audited["frozen_fve_nrm"], abs=1e-5)
    assert audited["gap_frozen_window"] > 0.1
    # It does not know the synonym, which is among the words that it cannot read.
    assert audited["frozen_synonyms_retention"] < 0.99


def test_interventions_of_a_bag_of_words(suite, evaluated, texts):
    """An edit turns the count of v into one of w, a third value only takes v away, and another
    word leaves both."""
    found = intervene(
        suite,
        evaluated,
        {"encoder": 1.0},
        {"original": None},
        {"animal": TokenVariable(ANIMALS), "colour": TokenVariable(np.arange(0))},
        seed=0,
    )
    value = lambda name: found[name].value
    assert value("intervention_rows") == 1
    times = np.where(np.arange(N_ROWS) % 2, 1, 2).mean()  # how often the animal stands there
    for group in ("", "next_", "animal_"):
        assert value(f"intervention_{group}shift") == pytest.approx(2 * times, rel=1e-6)
        assert value(f"third_value_intervention_{group}shift") == pytest.approx(times, rel=1e-6)
        assert abs(value(f"random_word_intervention_{group}shift")) < 0.5
        assert value(f"intervention_{group}success") == 1
        assert value(f"third_value_intervention_{group}success") == 0
    assert value("intervention_shift_minus_third_value") == pytest.approx(times, rel=1e-6)
    assert value("intervention_next_success_minus_third_value") == 1
    assert "intervention_colour_shift" not in found


def test_edits_of_next_words_of_a_bag_of_words(suite, evaluated, texts):
    """The first token of each text and the second are what M is said to be about to say."""
    reader = types.SimpleNamespace(
        of=lambda tokens: [Claim(NEXT, tokens[0], (0,)), Claim(NEXT, tokens[1], (1,))]
    )
    edits = draw_next_word_edits(texts, reader, None, seed=0)
    assert (edits.variable_N == 0).all()
    first, second = edits.pairs_N2.T
    np.testing.assert_array_equal(first, texts[:, 0])
    assert np.isin(second, texts[:, 0]).all()
    for name, changed in edits.texts.items():
        others = (changed != texts)[:, 1:].sum(axis=1)
        assert (others <= 1).all() if name == "random_word" else (others == 0).all()
    third = edits.texts["third_value"][:, 0]
    assert not (third == first).any() and not (third == second).any()
    assert not (second[:, None] == texts[:, :2]).any()
    found = intervene_on_next_words(
        suite, evaluated, {"encoder": 1.0}, {"original": None}, reader, seed=0
    )
    value = lambda name: found[name].value
    assert value("next_word_intervention_rows") == 1
    # An edit takes v away and adds w, a third value only takes v away.
    assert value("next_word_intervention_shift") == pytest.approx(2, rel=1e-6)
    assert value("third_value_next_word_intervention_shift") == pytest.approx(1, rel=1e-6)
    assert value("next_word_intervention_shift_minus_third_value") == pytest.approx(1, rel=1e-6)


def test_a_text_without_a_next_word_is_not_edited(texts):
    reader = types.SimpleNamespace(
        of=lambda tokens: [Claim(NEXT, tokens[0], (0,))] if tokens[0] % 2 else []
    )
    edits = draw_next_word_edits(texts, reader, None, seed=0)
    np.testing.assert_array_equal(edits.variable_N >= 0, texts[:, 0] % 2 == 1)
    np.testing.assert_array_equal(
        edits.texts["edit"][edits.variable_N < 0], texts[edits.variable_N < 0]
    )
