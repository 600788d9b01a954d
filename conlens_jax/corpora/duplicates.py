"""Copies of a text: counted, and never on both sides of the split.

Two texts are copies where they differ in white space only. The first one decides: a later copy on
the other side of the split is left out, one on the same side stays. So a corpus without copies is
split by the index alone, and what was read does not change when documents are added at the end.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

_CHARACTERS_AT_ONCE = 1 << 16
_LARGEST_TABLE = 1 << 16


@dataclasses.dataclass
class Tally:
    """What the reading of a corpus met so far, both sides of the split together.

    Attributes:
      read: documents that are not empty.
      copies: those among them that are copies of an earlier one.
      left_out: copies that would have stood on the other side of the split.
    """

    read: int = 0
    copies: int = 0
    left_out: int = 0


class SeenTexts:
    """Hashes of the texts so far, each with the side that its first text is on: 8 bytes a text.

    63 bits of the hash are kept: among ten million texts, two different ones are taken for copies
    with a probability of one in 200,000.
    """

    def __init__(self):
        # New hashes go to a table; when that is full, they are sorted into the array.
        self._recent: dict[int, bool] = {}
        self._sorted = np.zeros(0, np.uint64)

    def first_side(self, text: str, held_out: bool) -> bool | None:
        """Whether the first copy of ``text`` was held out; None, and noted, if this is the first.

        Args:
          held_out: the side of this one.
        """
        key = text_hash(text) & ~1
        side = self._recent.get(key)
        if side is not None:
            return side
        place = int(np.searchsorted(self._sorted, np.uint64(key)))
        if place < len(self._sorted) and (found := int(self._sorted[place])) & ~1 == key:
            return bool(found & 1)
        self._recent[key] = held_out
        if len(self._recent) > _LARGEST_TABLE + len(self._sorted) // 16:
            self._sort_in()
        return None

    def _sort_in(self) -> None:
        new = np.fromiter((key | side for key, side in self._recent.items()), np.uint64)
        self._sorted = np.sort(np.concatenate([self._sorted, new]))
        self._recent.clear()


def text_hash(text: str) -> int:
    """64 bits of the words of a text, whatever white space is between and around them."""
    digest = hashlib.blake2b(digest_size=8)
    begun = gap = False
    # Piece by piece: the words of a long text, as a list, would take many times its memory.
    for start in range(0, len(text), _CHARACTERS_AT_ONCE):
        piece = text[start : start + _CHARACTERS_AT_ONCE]
        words = " ".join(piece.split())
        if words:
            if begun and (gap or piece[0].isspace()):
                digest.update(b" ")
            digest.update(words.encode("utf-8", "surrogatepass"))
            begun, gap = True, False
        gap = gap or piece[-1].isspace()
    return int.from_bytes(digest.digest(), "big")
