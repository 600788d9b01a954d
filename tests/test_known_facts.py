"""What is known of stories and sums, and edits of their texts: against the documents themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from conlens_jax.config import WarmConfig
from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.corpora.statements import NOTHING, token_variables
from conlens_jax.corpora.stories import ATTRIBUTES, story
from conlens_jax.corpora.story_grammar import words
from conlens_jax.corpora.sums import VARIABLES, addition
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.studies.interventions import EDITS, draw_edits
from conlens_jax.evaluation.studies.known_facts import KnownFacts
from conlens_jax.evaluation.studies.truth import Readable, truth_of_texts
from conlens_jax.evaluation.suite import Suite
from conlens_jax.models.tokenizer import train_word_tokenizer

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
    return KnownFacts.of(rows, tokenizer, GENERATORS["stories"], SEED)


def test_truth_and_distance_are_the_storys_own(rows, facts, tokenizer):
    for row, document in enumerate(rows.documents_N):
        attributes = story(SEED, int(document)).attributes
        seen = story(SEED, int(document)).text.split()[: rows.positions_N[row] + 1]
        for index, name in enumerate(ATTRIBUTES):
            assert tokenizer.decode([facts.truth_NA[row, index]]) == attributes[name]
            backwards = seen[::-1]
            expected = backwards.index(attributes[name]) if attributes[name] in seen else NOTHING
            assert facts.distance_NA[row, index] == expected
    assert 0 < facts.mentioned_NA.mean() < 1
    np.testing.assert_array_equal(facts.known_NA, facts.mentioned_NA)


def test_what_texts_state_and_claim(facts, rows, tokenizer):
    names = list(facts.variables)
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
    names = list(facts.variables)
    readable = np.zeros_like(facts.mentioned_NA)
    animal = names.index("animal")
    readable[:, animal] = facts.mentioned_NA[:, animal]
    warm = WarmConfig(before=1, after=1)
    suite = Suite.make(None, rows, None, warm, frozenset(), n_resamples=20, seed=0)
    # Another layer holds the animal of the first half of the rows; everybody guesses nothing.
    first_half = np.arange(N_ROWS)[:, None] < N_ROWS // 2
    readable_from = Readable(readable, np.zeros_like(readable), {3: readable & first_half})
    texts_of = {"": texts, "null_shuffle_": texts[::-1], "sampled_": texts[::-1]}
    found = truth_of_texts(suite, facts, readable_from, texts_of)
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
    assert value("sampled_precision") == value("null_shuffle_precision") < 0.2
    assert value("null_shuffle_recall_animal") < 0.3 and "sampled_recall_animal" not in found
    assert value("prior_read") == 0
    early, late = readable[:20, animal], readable[20:, animal]
    assert value("probe_read_layer_3_animal") == pytest.approx(
        early.sum() / readable[:, animal].sum()
    )
    assert value("recall_layer_3") == pytest.approx(early[odd[:20]].sum() / early.sum())
    assert value("recall_beyond_layer_3") == pytest.approx(late[odd[20:]].sum() / late.sum())
    near = (facts.distance_NA[:, animal] >= 0) & (facts.distance_NA[:, animal] <= 3)
    assert value("recall_distance_0_3") == pytest.approx(odd[near].mean())
    assert "recall_food" not in found


def test_edits_change_the_word_that_they_say(tokenizer):
    variables = token_variables(GENERATORS["stories"].variables, tokenizer)
    lines = ["a shy duck , a shy duck .", "it was the end of it .", "red kite , blue drum , ha ."]
    lines[2] = "the red kite was by the mill"
    texts = np.array([tokenizer.encode(line)[:7] for line in lines], np.int32)
    found = set()
    for seed in range(30):
        edits = draw_edits(texts, variables, seed)
        assert list(edits.variable_N >= 0) == [True, False, True]
        np.testing.assert_array_equal(edits.texts["edit"][1], texts[1])
        for row in (0, 2):
            first, second = edits.pairs_N2[row]
            name = list(variables)[edits.variable_N[row]]
            found.add((row, name))
            assert first in texts[row] and second not in texts[row]
            assert {first, second} <= set(variables[name].values_K.tolist())
            expected = np.where(texts[row] == first, second, texts[row])
            np.testing.assert_array_equal(edits.texts["edit"][row], expected)
            third = edits.texts["third_value"][row]
            assert second not in third and first not in third
            np.testing.assert_array_equal(third == texts[row], expected == texts[row])
            other = edits.texts["random_word"][row] != texts[row]
            assert other.sum() <= 1 and not other[texts[row] == first].any()
    assert found >= {(0, "mood"), (0, "animal"), (2, "colour"), (2, "object"), (2, "place")}
    assert set(edits.texts) == set(EDITS)


# --- sums: variables with a tag, decided before they are stated -----------------------------------


@pytest.fixture(scope="module")
def sums():
    """Rows at every place of a few sums, with their words."""
    texts = [addition(SEED, index).text for index in range(4)]
    tokenizer = train_word_tokenizer([addition(SEED, index).text for index in range(40)], 64)
    encoded = [tokenizer.encode(text, add_bos=True) for text in texts]
    length = len(encoded[0])
    rows = Rows(
        np.zeros((4 * length, 2), np.float32),
        np.repeat(np.array(encoded, np.int32), length, axis=0),
        np.tile(np.arange(length, dtype=np.int32), 4),
        np.full(4 * length, length, np.int32),
        np.repeat(np.arange(4), length),
    )
    return tokenizer, rows, KnownFacts.of(rows, tokenizer, GENERATORS["sums"], SEED)


def test_facts_of_sums_are_decided_by_the_task_and_stated_later(sums):
    tokenizer, rows, facts = sums
    names = list(facts.variables)
    for row, (document, position) in enumerate(
        zip(rows.documents_N, rows.positions_N, strict=True)
    ):
        text = ["<bos>", *addition(SEED, int(document)).text.split()]
        task_ends = text.index(".") - 1
        for index, name in enumerate(names):
            tag = VARIABLES[name].tag
            stated = [
                place
                for place in range(len(tag), len(text))
                if tuple(text[place - len(tag) : place]) == tag and text[place].isdigit()
            ]
            truth = tokenizer.decode([facts.truth_NA[row, index]])
            assert {text[place] for place in stated} == {truth}
            before = [place for place in stated if place <= position]
            expected = position - before[-1] if before else NOTHING
            assert facts.distance_NA[row, index] == expected
            assert facts.ahead_NA[row, index] == (NOTHING if before else stated[0] - position)
        assert facts.known_NA[row].all() == (position >= task_ends) == facts.known_NA[row].any()


def test_a_value_counts_only_behind_its_tag(sums):
    tokenizer, rows, facts = sums
    names = list(facts.variables)
    column = names.index
    true = addition(SEED, 0).attributes
    wrong = str((int(true["tens"]) + 1) % 10)
    lines = [
        f"is {true['tens']} , tens {wrong} , hundreds carry {true['carry_hundreds']}",
        f"{true['ones']} . so with {true['carries']} carries : hundreds ,",
    ]
    texts = np.array([tokenizer.encode(line) for line in lines])
    assert texts.shape == (2, 9)
    facts = dataclasses.replace(facts, truth_NA=facts.truth_NA[:2])
    stated, (claims, right) = facts.stated_NA(texts), facts.claims_NA(texts)
    assert [name for name in names if stated[0, column(name)]] == ["carry_hundreds"]
    assert [name for name in names if stated[1, column(name)]] == ["carries"]
    assert dict(zip(names, claims[0], strict=True)) == dict.fromkeys(names, 0) | {
        "tens": 1,
        "carry_hundreds": 1,
    }
    assert claims[1].sum() == 1 and right.sum(axis=1).tolist() == [1, 1]


def test_an_edit_of_a_sum_keeps_the_same_digit_elsewhere(sums):
    tokenizer, _, facts = sums
    line = tokenizer.encode("7 and 0 is 7 , ones 7 , tens carry 0")
    texts = np.array([line] * 20, np.int32)
    edits = draw_edits(texts, facts.variables, 0)
    # Of two values there is no third, so a carry is never edited.
    assert {list(facts.variables)[i] for i in edits.variable_N} == {"ones"}
    for row in range(20):
        changed = np.flatnonzero(edits.texts["edit"][row] != line)
        assert changed.tolist() == [7] and edits.texts["edit"][row, 7] == edits.pairs_N2[row, 1]


def test_variables_that_a_tokenizer_cannot_say_are_left_out():
    tokenizer = train_word_tokenizer(["ones 1 2 . tens 7 . with 9"], 64)
    found = token_variables(VARIABLES, tokenizer)
    # It has no word for hundreds and carries, and none for a count of 0 to 3 but two.
    assert list(found) == ["ones", "tens", "carries"]
    assert tokenizer.decode(found["ones"].values_K) == "1 2 7 9"
    assert tokenizer.decode(found["carries"].values_K) == "1 2"


def test_what_is_ahead_is_read_by_a_probe_of_its_own(sums):
    """An activation that holds what is stated with one sign, and what is ahead with the other: no
    single linear map reads both."""
    _, rows, facts = sums
    values = np.unique([value for v in facts.variables.values() for value in v.values_K])
    one_hot_NAV = (facts.truth_NA[:, :, None] == values).astype(np.float32)
    sign_NA = np.where(facts.mentioned_NA, 1.0, -1.0)
    holds = (sign_NA[:, :, None] * one_hot_NAV).reshape(len(rows), -1)
    here = (dataclasses.replace(rows, activations_ND=holds.astype(np.float32)), facts)
    nothing = np.zeros_like(here[0].activations_ND)
    found = Readable.of(*here, *here, {7: (nothing, nothing)})
    np.testing.assert_array_equal(found.own_NA, facts.known_NA)
    # Without anything to look at, the best that a probe can do is to name a frequent value.
    guessed, blind = found.prior_NA.mean(), found.layers[7].mean()
    assert guessed - 0.05 < blind < 0.8 * facts.known_NA.mean()
    assert not found.prior_NA[~facts.known_NA].any()
