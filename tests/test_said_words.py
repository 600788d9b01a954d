"""Whether words are true: counted by hand on four rows of a tokenizer of words."""

from __future__ import annotations

import types

import numpy as np
import pytest

from conlens_jax.config import WarmConfig
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.studies.said_words import SaidWords
from conlens_jax.evaluation.suite import Evaluated, Suite
from conlens_jax.measurement.runner import ActivationStatistics, Explained
from conlens_jax.models.tokenizer import train_word_tokenizer

T = 8
CONTEXTS = ("anna saw a fox", "tom has a red sled", "the old cat ran", "a shy boy met kim")
POSITIONS = (3, 2, 3, 4)  # of the last word read: fox, a, ran, kim
# What M gives the highest probabilities, and texts: as written, of another row, and the target.
LIKELY = ("and . the saw red", "red old the a sled", ". and saw anna tom", ". and saw anna tom")
GREEDY = (
    "and , the | anna sled",  # both next words; anna of the context
    "fox , red | tom has ·",  # red; both; a gap is no word
    ". | cat",  # ends without more
    "kim , · , boy",  # neither; nothing of the context
)
TARGET = ("and | anna fox", "red | tom has", ". | old cat", ". | shy kim")


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer([*CONTEXTS, "and ."], 60, (",", "|", "·"))


@pytest.fixture(scope="module")
def truth(tokenizer):
    end = tokenizer.eos_id
    ids = lambda text: tokenizer.encode(text)
    filled = lambda texts: np.array([ids(t) + [end] * (T - len(ids(t))) for t in texts], np.int32)
    tokens = filled(CONTEXTS)
    rows = Rows(
        np.zeros((4, 2), np.float32),
        tokens,
        np.array(POSITIONS, np.int32),
        np.array([len(ids(text)) for text in CONTEXTS], np.int32),
        np.arange(4),
        filled(TARGET),
    )
    spec = types.SimpleNamespace(end=end, gap=ids("·")[0])
    suite = Suite.make(
        types.SimpleNamespace(spec=spec),
        rows,
        ActivationStatistics(np.zeros(2, np.float32), 1.0, 0.0, 4),
        WarmConfig(),
        frozenset(),
        n_resamples=20,
        seed=0,
        baseline=None,
    )
    assert suite.partner_N.tolist() == [2, 3, 0, 1]
    clean = types.SimpleNamespace(
        top_tokens=np.array([ids(text) for text in LIKELY]),
        top_probabilities=np.tile([0.5, 0.2, 0.1, 0.1, 0.05], (4, 1)),
    )
    texts = {"greedy": filled(GREEDY), "sampled": filled(TARGET)}
    evaluated = Evaluated(Explained(texts, {}), {"clean": clean}, {}, {})
    comma, separator = ids(",")[0], ids("|")[0]
    return SaidWords(suite, tokenizer, comma, separator).truth(evaluated)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("next_words_said", (2 + 2 + 1 + 2) / 4),
        ("next_words_right", (2 + 1 + 1 + 0) / 7),
        ("next_words_mass", (0.5 + 0.1 + 0.5 + 0.5 + 0.0) / 4),
        ("context_words_said", (2 + 2 + 1 + 0) / 4),
        ("context_words_right", (1 + 2 + 1 + 0) / 5),
        ("context_words_found", (1 + 2 + 1 + 0) / 8),
        # Row 0 has the text of row 2, and so on.
        ("null_shuffle_next_words_right", (1 + 0 + 1 + 0) / 7),
        ("null_shuffle_context_words_right", 0.0),
        ("target_next_words_right", 1.0),
        ("target_context_words_right", 1.0),
        ("sampled_context_words_found", 1.0),
    ],
)
def test_counts_are_those_by_hand(truth, name, expected):
    assert truth[name].value == pytest.approx(expected)


def test_a_word_after_the_position_is_not_of_the_context(truth):
    """The second context goes on with "red sled"; P is at "a"."""
    assert truth["target_context_words_said"].value == 2.0
