"""Whether words are true: counted by hand on four rows of a tokenizer of words."""

from __future__ import annotations

import types

import numpy as np
import pytest

from conlens_jax.config import WarmConfig
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.claims import WordClaims
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
DISTANCES = ("0_8", "9_16", "17_32", "33_up")
TARGET = ("and | anna fox", "red | tom has", ". | old cat", ". | shy kim")


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer([*CONTEXTS, "and ."], 60, (",", "|", "·"))


def measured(tokenizer, contexts, positions, texts, target, without="·", recent=False):
    """The metrics of texts (greedy and sampled ones) of four rows."""
    end = tokenizer.eos_id
    ids = lambda text: tokenizer.encode(text)

    def filled(texts, length=T):
        return np.array([ids(t) + [end] * (length - len(ids(t))) for t in texts], np.int32)

    rows = Rows(
        np.zeros((4, 2), np.float32),
        filled(contexts, max(len(ids(text)) for text in contexts)),
        np.array(positions, np.int32),
        np.array([len(ids(text)) for text in contexts], np.int32),
        np.arange(4),
        filled(target),
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
    texts = {"greedy": filled(texts), "sampled": filled(target)}
    without_vector = Explained({"greedy": filled([without] * 4)}, {})
    evaluated = Evaluated(Explained(texts, {}), without_vector, {"clean": clean}, {}, {})
    comma, separator = ids(",")[0], ids("|")[0]
    reader = WordClaims(tokenizer, comma, separator, spec.gap, recent)
    return SaidWords(suite, reader).truth(evaluated)


@pytest.fixture(scope="module")
def truth(tokenizer):
    return measured(tokenizer, CONTEXTS, POSITIONS, GREEDY, TARGET, "and | a")


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
        # All rows but 1 are about to say "and", and all but 2 have "a" up to P.
        ("null_novec_next_words_right", 3 / 4),
        ("null_novec_context_words_right", 3 / 4),
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


def test_words_of_the_context_by_distance(tokenizer):
    """Anna 34 tokens before P, the fox 17 and (again) 8, the sled at P."""
    words = ["the"] * 40
    words[1], words[18], words[27], words[35], words[36] = "anna", "fox", "fox", "sled", "kim"
    texts = ("| anna fox tom", "| sled", "| kim", "| fox")
    found = measured(tokenizer, [" ".join(words)] * 4, [35] * 4, texts, ["| anna fox sled"] * 4)
    share = lambda what: [found[f"{what}_distance_{d}"].value for d in DISTANCES]
    # Of six words: fox, sled, fox nearby, anna far away; tom nowhere; kim only after P.
    assert share("context_words_right") == [3 / 6, 0, 0, 1 / 6]
    assert sum(share("context_words_right")) == pytest.approx(found["context_words_right"].value)
    # Each target has two words nearby and one far away.
    np.testing.assert_equal(share("context_words_found"), [3 / 8, np.nan, np.nan, 1 / 4])
    # All rows have the same context.
    assert share("null_shuffle_context_words_right") == share("context_words_right")


def test_recent_tokens_are_right_at_their_place_only(tokenizer):
    texts = (
        "and | anna | a fox",  # both
        "red | | a has",  # neither: they are in the other order
        ". | cat | · ran",  # one of one
        "kim | | met",  # not the last one
    )
    found = measured(tokenizer, CONTEXTS, POSITIONS, texts, ["and | | ·"] * 4, recent=True)
    assert found["recent_tokens_said"].value == pytest.approx(6 / 4)
    assert found["recent_tokens_right"].value == pytest.approx(3 / 6)
    assert found["context_words_said"].value == pytest.approx(2 / 4)
    # Row 0 has the text of row 2, and so on: no context ends like that.
    assert found["null_shuffle_recent_tokens_right"].value == 0
    assert "recent_tokens_right" not in measured(tokenizer, CONTEXTS, POSITIONS, texts, texts)
