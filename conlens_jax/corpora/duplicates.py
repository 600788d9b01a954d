"""Duplicate texts: counted, and never in both splits.

Two texts are copies if they differ only in white space. A copy of an earlier text is left out if
the earlier one is in the other split, and kept if it is in the same split. So a corpus without
copies is split by the index alone, and appending documents does not change those before.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

_CHARACTERS_AT_ONCE = 1 << 16
_LARGEST_TABLE = 1 << 16


@dataclasses.dataclass
class Tally:
    """Counts of the documents read so far, in both splits together.

    Attributes:
      read: documents that are not empty.
      copies: those that are copies of an earlier one.
      left_out: copies that were left out because the first text is in the other split.
    """

    read: int = 0
    copies: int = 0
    left_out: int = 0


class SeenTexts:
    """Hashes of the texts so far, each with the split of its first text: 8 bytes per text.

    63 bits of the hash are kept: among ten million texts, the probability that two different ones
    are taken for copies is one in 200,000.
    """

    def __init__(self):
        # New hashes go into a table, which is merged into the sorted array when it is full.
        self._recent: dict[int, bool] = {}
        self._sorted = np.zeros(0, np.uint64)

    def first_side(self, text: str, held_out: bool) -> bool | None:
        """Whether the first copy of ``text`` was held out; None, and recorded, if this is it.

        Args:
          held_out: whether this one is in the validation split.
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
    """A hash of 64 bits of the words of a text, independent of white space."""
    digest = hashlib.blake2b(digest_size=8)
    begun = gap = False
    # In pieces: a list of the words of a long text would take many times its memory.
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
