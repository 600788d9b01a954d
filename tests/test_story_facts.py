"""Facts of stories, edits of their words: against the story's own attributes."""

from __future__ import annotations

import numpy as np
import pytest

from conlens_jax.config import WarmConfig
from conlens_jax.data.rows import Rows
from conlens_jax.data.stories import ATTRIBUTES, story
from conlens_jax.data.story_grammar import words
from conlens_jax.data.tokenizer import train_word_tokenizer
from conlens_jax.evaluation.interventions import EDITS, draw_edits
from conlens_jax.evaluation.story_facts import NOT_MENTIONED, StoryFacts, attribute_values
from conlens_jax.evaluation.suite import Suite
from conlens_jax.evaluation.truth import truth_of_texts

SEED, N_ROWS = 5, 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer([" ".join(sorted(words()))], 1024)


@pytest.fixture(scope="module")
def rows(tokenizer):
    documents = np.arange(100, 100 + N_ROWS)
    tokens = np.array([tokenizer.encode(story(SEED, d).text)[:24] for d in documents], np.int32)
    positions = (np.arange(N_ROWS) % 20 + 3).astype(np.int32)
    lengths = np.full(N_ROWS, 24, np.int32)
    activations = np.zeros((N_ROWS, 2), np.float32)
    return Rows(activations, tokens, positions, lengths, documents.astype(np.int64))


@pytest.fixture(scope="module")
def facts(rows, tokenizer):
    return StoryFacts.of(rows, tokenizer, SEED)


def test_truth_and_distance_are_the_storys_own(rows, facts, tokenizer):
    for row, document in enumerate(rows.documents_N):
        attributes = story(SEED, int(document)).attributes
        seen = story(SEED, int(document)).text.split()[: rows.positions_N[row] + 1]
        for index, name in enumerate(ATTRIBUTES):
            assert tokenizer.decode([facts.truth_NA[row, index]]) == attributes[name]
            backwards = seen[::-1]
            expected = (
                backwards.index(attributes[name]) if attributes[name] in seen else NOT_MENTIONED
            )
            assert facts.distance_NA[row, index] == expected
    assert 0 < facts.mentioned_NA.mean() < 1


def test_what_texts_state_and_claim(facts, rows, tokenizer):
    names = list(facts.values)
    right = [story(SEED, int(d)).attributes for d in rows.documents_N]
    wrong_animal = ["dog" if a["animal"] == "cat" else "cat" for a in right]
    lines = [
        f"{a['friend']} saw {other} and {a['animal']} ."
        for a, other in zip(right, wrong_animal, strict=True)
    ]
    texts = np.array([tokenizer.encode(line) for line in lines])
    stated, (claims, correct) = facts.stated_NA(texts), facts.claims_NA(texts)
    column = names.index
    assert stated[:, column("friend")].all() and stated[:, column("animal")].all()
    assert not stated[:, column("food")].any() and not stated[:, column("name")].any()
    # One list of people: the friend is a right claim, and counted once.
    assert (claims[:, column("name")] == 1).all() and (correct[:, column("name")] == 1).all()
    assert (claims[:, column("friend")] == 0).all()
    assert (claims[:, column("animal")] == 2).all() and (correct[:, column("animal")] == 1).all()
    assert claims.sum() == 3 * N_ROWS


def test_recall_and_precision_by_hand(facts, rows, tokenizer):
    """Every other row states its animal and a wrong colour, the others its food; a probe reads the
    animal of all rows where it was mentioned, and nothing else."""
    right = [story(SEED, int(d)).attributes for d in rows.documents_N]
    lines = [
        f"the {a['animal']} {'red' if a['colour'] != 'red' else 'blue'}"
        if row % 2
        else f"the {a['food']} was"
        for row, a in enumerate(right)
    ]
    texts = np.array([tokenizer.encode(line) for line in lines])
    names = list(facts.values)
    readable = np.zeros_like(facts.mentioned_NA)
    animal = names.index("animal")
    readable[:, animal] = facts.mentioned_NA[:, animal]
    warm = WarmConfig(before=1, after=1)
    suite = Suite.make(None, rows, None, warm, frozenset(), n_resamples=20, seed=0)
    found = truth_of_texts(suite, facts, readable, {"": texts, "other_": texts[::-1]})
    value = lambda name: found[name].value
    odd = np.arange(N_ROWS) % 2 == 1
    said = readable[odd, animal].sum() / readable[:, animal].sum()
    assert 0 < said < 1
    assert value("recall") == value("recall_animal") == pytest.approx(said)
    # 20 rows with one right and one wrong claim, 20 with one right.
    assert value("precision") == pytest.approx(40 / 60)
    assert value("precision_colour") == 0 and value("precision_food") == 1
    assert value("probe_read") == pytest.approx(readable.sum() / facts.mentioned_NA.sum())
    assert value("probe_read_animal") == 1 and value("probe_read_name") == 0
    assert value("other_precision") < 0.2
    near = (facts.distance_NA[:, animal] >= 0) & (facts.distance_NA[:, animal] <= 3)
    assert value("recall_distance_0_3") == pytest.approx(odd[near].mean())
    assert "recall_food" not in found


def test_edits_change_the_word_that_they_say(tokenizer):
    values = attribute_values(tokenizer)
    lines = ["a shy duck , a shy duck .", "it was the end of it .", "red kite , blue drum , ha ."]
    lines[2] = "the red kite was by the mill"
    texts = np.array([tokenizer.encode(line)[:7] for line in lines], np.int32)
    found = set()
    for seed in range(30):
        edits = draw_edits(texts, values, seed)
        assert list(edits.attribute_N >= 0) == [True, False, True]
        np.testing.assert_array_equal(edits.texts["edit"][1], texts[1])
        for row in (0, 2):
            first, second = edits.pairs_N2[row]
            name = list(values)[edits.attribute_N[row]]
            found.add((row, name))
            assert first in texts[row] and second not in texts[row]
            assert {first, second} <= set(values[name].tolist())
            expected = np.where(texts[row] == first, second, texts[row])
            np.testing.assert_array_equal(edits.texts["edit"][row], expected)
            third = edits.texts["third_value"][row]
            assert second not in third and first not in third
            np.testing.assert_array_equal(third == texts[row], expected == texts[row])
            other = edits.texts["random_word"][row] != texts[row]
            assert other.sum() <= 1 and not other[texts[row] == first].any()
    assert found >= {(0, "mood"), (0, "animal"), (2, "colour"), (2, "object"), (2, "place")}
    assert set(edits.texts) == set(EDITS)
