"""Which gradient comes back through the sampled text: the forms of ``lens.estimator``."""

from __future__ import annotations

import dataclasses

SCORE_FUNCTION = ("rloo", "grpo")
RELAXED = ("straight_through", "reinmax", "gumbel_rao")


@dataclasses.dataclass(frozen=True)
class Estimator:
    """``samples``: k of Gumbel-Rao, texts a row of a score-function estimator, else 1."""

    kind: str
    samples: int = 1


def parse_estimator(text: str) -> Estimator:
    kind, _, count = text.partition("=")
    return Estimator(kind, int(count) if count else 1)
