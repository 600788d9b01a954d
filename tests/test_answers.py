"""How many answers a model gets right, against models whose mistakes are known."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from conlens_jax.corpora.statements import token_variables
from conlens_jax.corpora.sums import VARIABLES, addition
from conlens_jax.embedded import answers
from conlens_jax.models.tokenizer import train_word_tokenizer

SUMS = [addition(0, index) for index in range(70)]
# Each column states a digit and a carry, the last line a count and the three digits again.
STATED = 3 * 2 + 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_tokenizer([document.text for document in SUMS], 64)


def measured(monkeypatch, tokenizer, mistake):
    """Statistics of a model that knows what follows, but for what ``mistake`` makes of it."""

    def knows(params, tokens_BS, *, model):
        return mistake(tokens_BS, jnp.roll(tokens_BS, -1, axis=1))

    monkeypatch.setattr(answers, "_top_predictions", knows)
    variables = token_variables(VARIABLES, tokenizer).values()
    return answers.answer_statistics({}, None, tokenizer, variables, SUMS)


def test_a_model_that_is_always_right(monkeypatch, tokenizer):
    found = measured(monkeypatch, tokenizer, lambda tokens, following: following)
    assert found == {"answers_right": 1, "exact_answers": 1}


def test_a_model_that_always_says_that_nothing_is_carried(monkeypatch, tokenizer):
    carry, zero = tokenizer.encode("carry 0")
    found = measured(
        monkeypatch,
        tokenizer,
        lambda tokens, following: jnp.where(tokens == carry, zero, following),
    )
    carries = np.array([int(document.attributes["carries"]) for document in SUMS])
    assert found["answers_right"] == pytest.approx(1 - carries.sum() / (STATED * len(SUMS)))
    assert found["exact_answers"] == pytest.approx(np.mean(carries == 0))


def test_what_is_no_answer_does_not_count(monkeypatch, tokenizer):
    """The digits of the task, the words that have a synonym, and totals."""
    asked = {tokenizer.encode(word)[0] for word in ("ones", "tens", "hundreds", "carry", "with")}
    found = measured(
        monkeypatch,
        tokenizer,
        lambda tokens, following: jnp.where(jnp.isin(tokens, jnp.array(list(asked))), following, 0),
    )
    assert found == {"answers_right": 1, "exact_answers": 1}
