"""The words of an explanation, each with what is known of its being right.

Wherever explanations are shown, a word with a support of at least :data:`SURE` stands out, and one
below :data:`DOUBTFUL` is dim. Where a lens has no support, the decoder's own probability takes its
place and is named as such.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

SURE, DOUBTFUL = 0.9, 0.5
NO_SUPPORT = "No support: how often words of this lens are right was not measured."


class Word(NamedTuple):
    """One word of a text.

    Attributes:
      space: the white space before it.
      text: the word.
      support: the calibrated probability that the claim it belongs to is right; None where it
        belongs to none, or without a calibration.
      probability: the decoder's probability of its tokens, each given those before it.
    """

    space: str
    text: str
    support: float | None
    probability: float | None

    def value(self, calibrated: bool) -> float | None:
        """The number that is shown: the support or, without a calibration, the probability; None
        for punctuation and gaps."""
        if calibrated:
            return self.support
        return self.probability if any(map(str.isalnum, self.text)) else None


def note_of(value: float, calibrated: bool, warned: bool = False) -> str:
    """What the number of a word is, in words. Two digits, rounded down: a support below 1 is never
    shown as 1.

    Args:
      warned: the word is of a row that should not be believed.
    """
    digits = f"{math.floor(100 * value + 1e-6) / 100:.2f}"
    if not calibrated:
        return f"the decoder's own probability {digits}"
    return f"support {digits}" + (", but not measured on rows with a warning" if warned else "")


def level(value: float | None) -> str:
    """How a word of this support is shown: ``"sure"``, ``"doubtful"``, or empty."""
    if value is None or DOUBTFUL <= value < SURE:
        return ""
    return "sure" if value >= SURE else "doubtful"


def words_of(
    pieces: Sequence[str],
    support: Sequence[float | None] | None = None,
    probabilities: Sequence[float] | None = None,
) -> tuple[Word, ...]:
    """The words of a text; a claim of several words is several.

    Args:
      pieces: the text of each token.
      support, probabilities: of each token, as far as they are known.
    """
    nothing = [None] * len(pieces)
    words: list[Word] = []
    for piece, sure, p in zip(pieces, support or nothing, probabilities or nothing, strict=True):
        text = piece.strip()
        space = piece[: len(piece) - len(piece.lstrip())]
        last = words[-1] if words else None
        if last is not None and (not piece or _continues(last, space + text, sure)):
            both = None if p is None or last.probability is None else last.probability * p
            words[-1] = last._replace(text=last.text + text, probability=both)
        elif text:
            words.append(Word(space if words else "", text, sure, p))
    return tuple(words)


def _continues(word: Word, piece: str, support: float | None) -> bool:
    """Whether a piece belongs to the word before it: letters or digits after such, without a space,
    of a script that puts spaces between words, and of the same claim."""
    first, last = piece[:1], word.text[-1:]
    if word.support != support or not (_in_word(first) and _in_word(last)):
        return False
    return not any(unicodedata.east_asian_width(c) in "WF" for c in (first, last))


def _in_word(character: str) -> bool:
    # U+FFFD is a part of a character that several tokens make.
    return character.isalnum() or character == "\ufffd" or bool(unicodedata.combining(character))
