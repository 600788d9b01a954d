"""Damage to a text that leaves most of its meaning: what a code survives less well than words do.

Every change maps texts to texts of at most the same length, row by row, with randomness of its own
for each row. They are data (:data:`CHANGES`): every reader reads all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from conlens_jax.config.seeds import numpy_seed
from conlens_jax.corpora.statements import known_ids
from conlens_jax.models.tokenizer import Tokenizer

DROPPED = (10, 25, 50)
"""Percent of the tokens that are left out at random."""


class Texts(NamedTuple):
    """Token ids, of which the first ``lengths_N`` of each row count; at least one."""

    tokens_NT: np.ndarray
    lengths_N: np.ndarray

    @staticmethod
    def whole(tokens_NT: np.ndarray) -> Texts:
        return Texts(tokens_NT, np.full(len(tokens_NT), tokens_NT.shape[1], np.int32))


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """What the changes know of the tokens, one entry per token of the vocabulary.

    Attributes:
      starts_word: the token begins a word. Where no token of the vocabulary begins with a space,
        every token is a word.
      is_punctuation: the token has no letter and no digit.
      synonym: a token that the corpus uses as often in its place, or the token itself.
    """

    starts_word: np.ndarray
    is_punctuation: np.ndarray
    synonym: np.ndarray

    @staticmethod
    def of(tokenizer: Tokenizer, synonyms: Mapping[str, str]) -> Lexicon:
        """``synonyms``: a word and its exact synonym, known only for a generated corpus."""
        words = [tokenizer.token(token) for token in range(tokenizer.vocab_size)]
        spaced = np.array([word.startswith(" ") for word in words])
        synonym = np.arange(len(words), dtype=np.int32)
        for word, other in synonyms.items():
            ids = [known_ids(w, tokenizer) for w in (word, other)]
            if all(len(i) == 1 for i in ids):
                synonym[ids[0][0]] = ids[1][0]
        return Lexicon(
            starts_word=spaced if spaced.any() else np.ones(len(words), bool),
            is_punctuation=np.array(
                [bool(word.strip()) and not any(c.isalnum() for c in word) for word in words]
            ),
            synonym=synonym,
        )


Change = Callable[[np.ndarray, Lexicon, np.random.Generator], np.ndarray]


def _shuffle_words(text: np.ndarray, lexicon: Lexicon, rng: np.random.Generator) -> np.ndarray:
    starts = np.flatnonzero(lexicon.starts_word[text])
    words = np.split(text, starts[starts > 0])
    return np.concatenate([words[index] for index in rng.permutation(len(words))])


def _drop_tokens(
    text: np.ndarray, lexicon: Lexicon, rng: np.random.Generator, *, percent: int
) -> np.ndarray:
    return text[rng.random(len(text)) >= percent / 100]


def _no_punctuation(text: np.ndarray, lexicon: Lexicon, rng: np.random.Generator) -> np.ndarray:
    return text[~lexicon.is_punctuation[text]]


def _synonyms(text: np.ndarray, lexicon: Lexicon, rng: np.random.Generator) -> np.ndarray:
    return lexicon.synonym[text]


CHANGES: Mapping[str, tuple[Change, str]] = {
    "shuffle_words": (_shuffle_words, "the words in random order"),
    **{
        f"drop_{percent}": (
            functools.partial(_drop_tokens, percent=percent),
            f"{percent} % of the tokens left out at random",
        )
        for percent in DROPPED
    },
    "no_punctuation": (_no_punctuation, "punctuation and quotes left out"),
    "synonyms": (_synonyms, "words replaced by exact synonyms of the corpus"),
}


def changed(tokens_NT: np.ndarray, name: str, lexicon: Lexicon, seed: int) -> Texts:
    """The texts after one of :data:`CHANGES`. A text that would be left empty keeps its first
    token."""
    change, _ = CHANGES[name]
    after = Texts(tokens_NT.copy(), np.empty(len(tokens_NT), np.int32))
    # The embedding table may have more rows than the tokenizer has tokens.
    known_V = len(lexicon.synonym)
    for row, text in enumerate(tokens_NT):
        rng = np.random.default_rng((numpy_seed(seed), row))
        kept = change(text, lexicon, rng) if text.max() < known_V else text
        kept = kept if len(kept) else text[:1]
        after.tokens_NT[row, : len(kept)], after.lengths_N[row] = kept, len(kept)
    return after


def is_changed(before_NT: np.ndarray, after: Texts) -> np.ndarray:
    """Which rows a change has changed, [N]."""
    same_length = after.lengths_N == before_NT.shape[1]
    return ~(same_length & np.all(before_NT == after.tokens_NT, axis=1))
