"""Claims: found by hand in hand-made texts, and right or wrong against rows made for them."""

from __future__ import annotations

import types

import numpy as np
import pytest

from conlens_jax.config import WarmConfig
from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.corpora.stories import story
from conlens_jax.corpora.story_grammar import words
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.claims import FactClaims, WordClaims, claim_reader
from conlens_jax.evaluation.studies.claims import FactTruth, checked_claims, truth_of_claims
from conlens_jax.evaluation.studies.known_facts import KnownFacts
from conlens_jax.evaluation.suite import Evaluated, Suite
from conlens_jax.measurement.runner import Explained
from conlens_jax.models.tokenizer import train_word_tokenizer

SEED, N_ROWS = 5, 12


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer([" ".join(sorted(words()))], 1024, (",", "|", "·"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("and , the | fox", [("next", "and", 0), ("next", "the", 2), ("context", "fox", 4)]),
        ("· | fox · bear", [("context", "fox", 2), ("context", "bear", 4)]),
        ("and , · , and", [("next", "and", 0), ("next", "and", 4)]),
        ("| fox .", [("context", "fox", 1)]),
        (", ,", []),
        ("", []),
    ],
)  # fmt: skip
def test_claims_of_words_and_their_places(tokenizer, text, expected):
    comma, separator, gap = tokenizer.encode(", | ·")
    reader = claim_reader({"comma": comma, "separator": separator}, tokenizer, gap)
    found = [
        (c.kind, c.says if c.kind == "context" else tokenizer.decode([c.says]), *c.places)
        for c in reader.of(tokenizer.encode(text))
    ]
    assert found == expected
    assert claim_reader(reader.to_json(), tokenizer, gap) == reader


def test_claims_of_recent_tokens_count_from_the_end(tokenizer):
    comma, separator, gap = tokenizer.encode(", | ·")
    settings = {"comma": comma, "separator": separator, "recent_tokens": True}
    reader = claim_reader(settings, tokenizer, gap)
    tokens = tokenizer.encode("and | fox · | the · bear")
    assert [(c.kind, c.says, c.places) for c in reader.of(tokens)] == [
        ("next", tokens[0], (0,)),
        ("context", "fox", (2,)),
        ("recent", (2, tokens[5]), (5,)),
        ("recent", (0, tokens[7]), (7,)),
    ]
    # The separator can be one of the source's tokens, and the second part may be empty.
    assert [c.says for c in reader.of(tokenizer.encode("| | and |"))] == [
        (1, tokens[0]),
        (0, separator),
    ]
    assert claim_reader(reader.to_json(), tokenizer, gap) == reader


def test_a_word_of_several_pieces_is_one_claim():
    """Without a comma every token before the separator is a next word of its own."""
    pieces = [" an", " the", "|", " phas", "ed", "-", "in", "·", " fox"]
    tokenizer = types.SimpleNamespace(
        piece=pieces.__getitem__, decode=lambda tokens: "".join(pieces[t] for t in tokens)
    )
    claims = WordClaims(tokenizer, comma=None, separator=2, gap=7).of((0, 1, 2, 7, 3, 4, 5, 6, 8))
    assert [(c.kind, c.says, c.places) for c in claims] == [
        ("next", 0, (0,)),
        ("next", 1, (1,)),
        ("context", "phased-in", (4, 5, 6, 7)),
        ("context", "fox", (8,)),
    ]


@pytest.fixture(scope="module")
def stories(tokenizer):
    """Rows of stories, and texts that state a right animal, a wrong one, and the friend."""
    documents = np.arange(100, 100 + N_ROWS)
    attributes = [story(SEED, int(d)).attributes for d in documents]
    lines = [
        f"{a['friend']} saw {a['animal']} and {'dog' if a['animal'] == 'cat' else 'cat'}"
        for a in attributes
    ]
    texts = np.array([tokenizer.encode(line) for line in lines], np.int32)
    tokens = np.array([tokenizer.encode(story(SEED, d).text)[:8] for d in documents], np.int32)
    full = np.full(N_ROWS, 8, np.int32)
    rows = Rows(np.zeros((N_ROWS, 2), np.float32), tokens, full - 4, full, documents)
    measurer = types.SimpleNamespace(spec=types.SimpleNamespace(end=None, gap=None))
    suite = Suite.make(measurer, rows, None, WarmConfig(), frozenset(), n_resamples=20, seed=0)
    facts = KnownFacts.of(rows, tokenizer, GENERATORS["stories"], SEED)
    return suite, FactTruth(FactClaims("stories", facts.variables), facts), texts


def test_claims_of_facts_are_those_that_are_counted(stories, tokenizer):
    suite, truth, texts = stories
    checked = checked_claims(suite, truth, None, texts)
    claims_NA, right_NA = truth.facts.claims_NA(texts)
    assert len(checked) == claims_NA.sum() == 3 * N_ROWS
    for row in range(N_ROWS):
        found = [(c.claim.places, c.is_right) for c in checked if c.row == row]
        assert found == [((0,), True), ((2,), True), ((4,), False)]
        assert right_NA[row].sum() == 2
    again = claim_reader(truth.reader.to_json(), tokenizer, None)
    assert [again.of(text) for text in texts.tolist()] == list(map(truth.reader.of, texts.tolist()))


def test_metrics_are_shares_by_hand(stories):
    suite, truth, texts = stories
    half = np.where(np.arange(N_ROWS)[:, None] % 2 == 0, texts, texts[:, :1])
    explained = Explained({"greedy": texts, "sampled": half}, {})
    without_vector = Explained({"greedy": np.tile(texts[0, :3], (N_ROWS, 1))}, {})
    evaluated = Evaluated(explained, without_vector, {"clean": None}, {}, {})
    found = truth_of_claims(suite, truth, evaluated, checked_claims(suite, truth, None, texts))
    value = {name: interval.value for name, interval in found.items()}
    assert value["claims"] == value["null_shuffle_claims"] == 3
    assert value["claims_right"] == pytest.approx(2 / 3)
    # Every other text states its friend alone, five times.
    assert value["sampled_claims"] == (3 + 5) / 2
    assert value["sampled_claims_right"] == pytest.approx((2 + 5) / (3 + 5))
    # One text for all rows: the friend and the animal of the first row.
    alone = truth.facts.claims_NA(np.tile(texts[0, :3], (N_ROWS, 1)))
    assert value["null_novec_claims"] == 2
    assert value["null_novec_claims_right"] == alone[1].sum() / alone[0].sum() < 0.5
    facts = truth.facts.claims_NA(texts[suite.partner_N])
    expected = facts[1].sum() / facts[0].sum()
    assert value["null_shuffle_claims_right"] == pytest.approx(expected)
    assert expected < 0.5
