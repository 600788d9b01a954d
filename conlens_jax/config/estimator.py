"""The forms of ``lens.estimator``: which gradient comes back through the sampled text."""

from __future__ import annotations

import dataclasses

SCORE_FUNCTION = ("rloo", "grpo")
# No gradient comes back through the tokens themselves.
TOKENS_ARE_CONSTANT = (*SCORE_FUNCTION, "detached")
# Texts may be sampled at another temperature than 1.
ANY_SAMPLE_TAU = ("straight_through", "detached")
FORMS = "'straight_through', 'reinmax', 'gumbel_rao=k', 'rloo=k', 'grpo=k' or 'detached'"
_LEAST_SAMPLES = {"gumbel_rao": 1, "rloo": 2, "grpo": 2}


@dataclasses.dataclass(frozen=True)
class Estimator:
    """``samples``: k noise draws of Gumbel-Rao, k texts a row of a score function, else 1."""

    kind: str = "straight_through"
    samples: int = 1


def parse_estimator(text: str) -> Estimator:
    """Raises ValueError with the allowed forms."""
    kind, _, count = text.partition("=")
    if text in ("straight_through", "reinmax", "detached"):
        return Estimator(kind)
    if not (kind in _LEAST_SAMPLES and count.isdigit() and int(count) >= _LEAST_SAMPLES[kind]):
        raise ValueError(f"lens.estimator must be {FORMS} (k ≥ 2 for rloo and grpo), not {text!r}")
    return Estimator(kind, int(count))
