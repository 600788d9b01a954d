"""What a lens saw in training, and what it never saw: there its texts mean nothing."""

from __future__ import annotations

import base64
import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

OUTSIDE = 0.001
"""The share of the training activations whose norm is below the range of norms, and above it."""


@dataclasses.dataclass(frozen=True)
class TrainingRange:
    """Of the training rows. None: not recorded, as in runs and lenses of earlier versions.

    Attributes:
      first_position, last_position: as indices into the tokens of a text.
      norms: the quantiles :data:`OUTSIDE` and 1 − :data:`OUTSIDE` of the norms of activations.
      tokens: which token ids their contexts have, eight to a byte, the first in the lowest bit.
    """

    first_position: int | None = None
    last_position: int | None = None
    norms: tuple[float, float] | None = None
    tokens: bytes | None = None

    def has_token(self, token_id: int) -> bool:
        """Whether a context had this token; True if that was not recorded."""
        if self.tokens is None:
            return True
        byte = token_id // 8
        return byte < len(self.tokens) and bool(self.tokens[byte] >> token_id % 8 & 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = dataclasses.asdict(self)
        if self.tokens is not None:
            values["tokens"] = base64.b64encode(zlib.compress(self.tokens)).decode()
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainingRange:
        """The inverse of :meth:`to_json`."""
        norms, tokens = values.get("norms"), values.get("tokens")
        return cls(
            values.get("first_position"),
            values.get("last_position"),
            None if norms is None else (float(norms[0]), float(norms[1])),
            None if tokens is None else zlib.decompress(base64.b64decode(tokens)),
        )


def norm_range(activations_ND: np.ndarray) -> tuple[float, float]:
    """:attr:`TrainingRange.norms` of these activations."""
    norms_N = np.linalg.norm(np.asarray(activations_ND, np.float64), axis=1)
    low, high = np.quantile(norms_N, [OUTSIDE, 1 - OUTSIDE])
    return float(low), float(high)


def tokens_seen(contexts: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> bytes:
    """:attr:`TrainingRange.tokens` of contexts: tokens [G, S] with padding, and their lengths."""
    seen_V = np.zeros(vocab_size, bool)
    for tokens_GS, lengths_G in contexts:
        seen_V[tokens_GS[np.arange(tokens_GS.shape[1]) < lengths_G[:, None]]] = True
    return np.packbits(seen_V, bitorder="little").tobytes()
