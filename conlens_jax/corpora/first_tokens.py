"""The first tokens of long texts, without tokenising the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_LEAST_CHARACTERS = 4096
_CHARACTERS_A_TOKEN = 16
_MARGIN = 32
"""Tokens before a cut that are not trusted."""
_WAY_BACK = 256

Encode = Callable[[Sequence[str]], list[list[int]]]


def first_tokens(encode: Encode, texts: Sequence[str], count: int) -> list[list[int]]:
    """For each text its first ``count`` tokens, or more; all that it has where they are fewer.

    They are those of the whole text. A long text is tokenised up to a cut, and up to another one
    twice as far, until both give the same tokens and end well behind them: a cut changes the word
    that it falls into, and hardly ever more.

    Args:
      encode: the tokens of several texts.
    """
    found: list[list[int]] = [[] for _ in texts]
    before: dict[int, list[int]] = {}
    open_texts = list(range(len(texts)))
    size = max(_LEAST_CHARACTERS, _CHARACTERS_A_TOKEN * count)
    while open_texts:
        pieces = [_beginning(texts[index], size) for index in open_texts]
        still_open = []
        for index, piece, tokens in zip(open_texts, pieces, encode(pieces), strict=True):
            shorter = before.get(index, [])
            same = len(shorter) >= count + _MARGIN and shorter[:count] == tokens[:count]
            if same:
                found[index] = tokens[:count]
            elif len(piece) == len(texts[index]):
                found[index] = tokens
            else:
                before[index] = tokens
                still_open.append(index)
        open_texts = still_open
        # Not a multiple of three either: some tokenizers group digits from the end of a number.
        size = 2 * size if size % 3 else 2 * size + 1
    return found


def _beginning(text: str, size: int) -> str:
    """About ``size`` characters, cut before white space where there is some; a text that is not
    twice as long as a whole."""
    if len(text) <= 2 * size:
        return text
    for end in range(size, size - _WAY_BACK, -1):
        if text[end].isspace() and not text[end - 1].isspace():
            return text[:end]
    return text[:size]
