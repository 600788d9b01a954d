"""The first tokens of long texts, without tokenising the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_LEAST_CHARACTERS = 4096
_CHARACTERS_PER_TOKEN = 16
_MARGIN = 32
"""Tokens before a cut that may differ from those of the whole text."""
_WAY_BACK = 256

Encode = Callable[[Sequence[str]], list[list[int]]]


def first_tokens(encode: Encode, texts: Sequence[str], count: int) -> list[list[int]]:
    """The first ``count`` tokens (or more) of each text; all of them if it has fewer.

    They are the same as those of the whole text. A long text is tokenised up to a cut and up to a
    second one twice as far, until both give the same tokens and end well after them: a cut changes
    the word at the cut, and hardly ever more.

    Args:
      encode: tokenises several texts.
    """
    found: list[list[int]] = [[] for _ in texts]
    before: dict[int, list[int]] = {}
    open_texts = list(range(len(texts)))
    size = max(_LEAST_CHARACTERS, _CHARACTERS_PER_TOKEN * count)
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
        # Not a multiple of three: some tokenizers group digits from the end of a number.
        size = 2 * size if size % 3 else 2 * size + 1
    return found


def _beginning(text: str, size: int) -> str:
    """About ``size`` characters, cut before white space if possible; all of the text if it is at
    most twice as long."""
    if len(text) <= 2 * size:
        return text
    for end in range(size, size - _WAY_BACK, -1):
        if text[end].isspace() and not text[end - 1].isspace():
            return text[:end]
    return text[:size]
