"""Whole words of a text out of a tokenizer's pieces."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from conlens_jax.models.tokenizer import Tokenizer

_JOINING = frozenset("-'’._/")
_REMEMBERED = 1 << 18


class Word(NamedTuple):
    """A word of a text.

    Attributes:
      key: its text in lower case: two words with the same key are the same word.
      tokens: its tokens, without the punctuation around it.
      last: index of its last token in the text.
    """

    key: str
    tokens: tuple[int, ...]
    last: int


class WholeWords:
    """Finds the words of token lists.

    A word begins with a token that a space or line break comes before (with tokenizers of words:
    with every token) and ends before the next such token. Punctuation around it and special tokens
    do not belong to it; inside it are only signs that join (``phased-in``, ``os.path``, but not
    ``list[int]``).
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._piece = functools.cache(tokenizer.piece)
        self._parts = functools.lru_cache(_REMEMBERED)(self._is_boundary)
        self._word = functools.lru_cache(_REMEMBERED)(self._find_word)

    def of(self, tokens: Sequence[int]) -> Iterator[Word]:
        """The words of a text, in order."""
        start = 0
        for index in range(1, len(tokens) + 1):
            if index == len(tokens) or self._parts(tokens[index - 1], tokens[index]):
                key, word, n_after = self._word(tuple(tokens[start:index]))
                if key:
                    yield Word(key, word, index - 1 - n_after)
                start = index

    def _is_boundary(self, token: int, following: int) -> bool:
        """Whether a word ends between two tokens."""
        before, after = self._piece(token), self._piece(following)
        if not before or not after or before[-1].isspace() or after[0].isspace():
            return True
        return any(_only_punctuation(piece) and set(piece) - _JOINING for piece in (before, after))

    def _find_word(self, tokens: tuple[int, ...]) -> tuple[str, tuple[int, ...], int]:
        """Key and tokens of the word in a run of tokens, and how many of the run come after it."""
        inner = [i for i, token in enumerate(tokens) if not _only_punctuation(self._piece(token))]
        if not inner:
            return "", (), 0
        first, last = inner[0], inner[-1]
        word = tokens[first : last + 1]
        text = self._tokenizer.decode(word).strip()
        return _without_punctuation(text).casefold(), word, len(tokens) - 1 - last

    def after_space(self, word: Word) -> tuple[int, ...]:
        """The word's tokens as they are after a space: one that begins a text or a line, or that
        comes after a bracket, can have others."""
        if self._piece(word.tokens[0])[0].isspace():
            return word.tokens
        return tuple(self._tokenizer.encode(" " + self._tokenizer.decode(word.tokens)))


def _is_punctuation(character: str) -> bool:
    # Punctuation, symbols, separators and control characters. The sign for a piece of a character
    # (U+FFFD) may be a letter's.
    return unicodedata.category(character)[0] in "PSZC" and character != "\ufffd"


def _only_punctuation(text: str) -> bool:
    return all(map(_is_punctuation, text))


def _without_punctuation(text: str) -> str:
    inner = [i for i, character in enumerate(text) if not _is_punctuation(character)]
    return text[inner[0] : inner[-1] + 1] if inner else ""
