"""What every kind of target has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

from conlens_jax.data.rows import Rows


class NextTokens(NamedTuple):
    """M's likeliest next tokens at P of N rows, the likeliest first.

    Attributes:
      ids_Nk: int32.
      probabilities_Nk: float32.
    """

    ids_Nk: np.ndarray
    probabilities_Nk: np.ndarray


class Targets(Protocol):
    """Makes the targets of rows, a pure function of the settings and the row.

    Attributes:
      n_next: how many of M's likeliest next tokens it needs at each position; with 0, M is run up
        to block L only.
      content: what determines the targets besides the settings, for the metadata of a cache.
    """

    n_next: int = 0
    content: Mapping[str, str | None] = MappingProxyType({})

    def positions(self, document: int, possible: np.ndarray) -> np.ndarray:
        """Those of the ``possible`` positions of a document that have a target."""
        return possible

    def texts(self, rows: Rows, next_tokens: NextTokens | None) -> list[Sequence[int]]:
        """The tokens of each row's target, without the end token.

        Args:
          rows: any number of rows; their activations may be missing.
          next_tokens: of the same rows; None if ``n_next`` is 0.
        """
        ...

    def speed(self) -> Mapping[str, float]:
        """For the log: how fast a model wrote them; empty where none does."""
        return {}

    def release(self) -> None:
        """Frees what only :meth:`texts` needs, which is not called again."""


def filled(texts: Sequence[Sequence[int]], text_len: int, end: int) -> np.ndarray:
    """The texts as an array, filled up with the end token; [N, text_len] int32."""
    targets_NT = np.full((len(texts), text_len), end, np.int32)
    for target_T, text in zip(targets_NT, texts, strict=True):
        kept = text[:text_len]
        target_T[: len(kept)] = kept
    return targets_NT
