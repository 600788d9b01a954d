"""Damage to texts: what stays, what goes, and that it is the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from conlens_jax.corpora.stories import SYNONYMS
from conlens_jax.evaluation.studies.text_changes import (
    CHANGES,
    DROPPED,
    Lexicon,
    changed,
    is_changed,
)
from conlens_jax.models.tokenizer import train_bpe_tokenizer, train_word_tokenizer

WORDS = "tom was a little happy dog . he smiled , and anna shouted !"


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer([WORDS, " ".join(SYNONYMS)], 128)


@pytest.fixture(scope="module")
def lexicon(tokenizer):
    return Lexicon.of(tokenizer, SYNONYMS)


def texts(tokenizer, *lines):
    return np.array([tokenizer.encode(line) for line in lines], np.int32)


def written(tokenizer, after, row=0):
    return tokenizer.decode(after.tokens_NT[row, : after.lengths_N[row]])


def test_words_are_shuffled_and_none_is_lost(tokenizer, lexicon):
    before = texts(tokenizer, *[WORDS] * 20)
    after = changed(before, "shuffle_words", lexicon, 0)
    np.testing.assert_array_equal(np.sort(after.tokens_NT), np.sort(before))
    assert len({tuple(row) for row in after.tokens_NT}) == 20
    assert is_changed(before, after).all()


def test_pieces_of_a_word_stay_together():
    """In a vocabulary whose tokens carry the space before a word."""
    tokenizer = train_bpe_tokenizer([WORDS] * 4, 300)
    lexicon = Lexicon.of(tokenizer, {})
    before = texts(tokenizer, " zzqx tom jjq was")
    after = changed(np.repeat(before, 8, axis=0), "shuffle_words", lexicon, 0)
    found = {written(tokenizer, after, row) for row in range(8)}
    assert len(found) > 1
    assert {" ".join(sorted(text.split())) for text in found} == {"jjq tom was zzqx"}


def test_tokens_are_dropped_and_one_stays(tokenizer, lexicon):
    before = texts(tokenizer, *[WORDS] * 400)
    for percent in DROPPED:
        after = changed(before, f"drop_{percent}", lexicon, 0)
        kept = (1 - percent / 100) * before.shape[1]
        assert after.lengths_N.mean() == pytest.approx(kept, rel=0.03)
    single = changed(before[:, :1], "drop_50", lexicon, 0)
    assert (single.lengths_N == 1).all()


def test_punctuation_goes(tokenizer, lexicon):
    after = changed(texts(tokenizer, WORDS), "no_punctuation", lexicon, 0)
    assert written(tokenizer, after) == "tom was a little happy dog he smiled and anna shouted"
    nothing_else = changed(texts(tokenizer, ". ! ,"), "no_punctuation", lexicon, 0)
    assert written(tokenizer, nothing_else) == "."


def test_synonyms_are_the_grammars(tokenizer, lexicon):
    after = changed(texts(tokenizer, WORDS), "synonyms", lexicon, 0)
    expected = "tom was a small glad dog . he grinned , and anna yelled !"
    assert written(tokenizer, after) == expected
    back = changed(after.tokens_NT, "synonyms", lexicon, 0)
    np.testing.assert_array_equal(back.tokens_NT, texts(tokenizer, WORDS))


def test_no_synonyms_are_known_of_another_corpus(tokenizer):
    before = texts(tokenizer, WORDS)
    after = changed(before, "synonyms", Lexicon.of(tokenizer, {}), 0)
    assert not is_changed(before, after).any()


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_is_changed_alike_wherever_it_stands(tokenizer, lexicon, name):
    before = texts(tokenizer, *[WORDS] * 4)
    original = before.copy()
    all_rows, first = changed(before, name, lexicon, 3), changed(before[:2], name, lexicon, 3)
    np.testing.assert_array_equal(before, original)
    np.testing.assert_array_equal(all_rows.tokens_NT[:2], first.tokens_NT)
    np.testing.assert_array_equal(all_rows.lengths_N[:2], first.lengths_N)


def test_tokens_without_a_name_stay(lexicon):
    """A model's table may be longer than its tokenizer."""
    before = np.array([[500, 1, 500]], np.int32)
    after = changed(before, "no_punctuation", lexicon, 0)
    np.testing.assert_array_equal(after.tokens_NT, before)
