"""The gradient estimators: which gradient comes back through the sampled text."""

from __future__ import annotations

import dataclasses

from conlens_jax.config.lens import LensConfig

SCORE_FUNCTION = ("rloo", "grpo")
ESTIMATORS = ("straight_through", "reinmax", "gumbel_rao", *SCORE_FUNCTION, "detached")
# No gradient comes back through the tokens themselves.
TOKENS_ARE_CONSTANT = (*SCORE_FUNCTION, "detached")
# Texts may be sampled at another temperature than 1.
ANY_SAMPLE_TAU = ("straight_through", "detached")
# Those that draw several samples, and the fewest that each can work with.
FEWEST_SAMPLES = {"gumbel_rao": 1, "rloo": 2, "grpo": 2}


@dataclasses.dataclass(frozen=True)
class Estimator:
    """``samples``: k noise draws of Gumbel-Rao, k texts per row of a score function, else 1."""

    kind: str = "straight_through"
    samples: int = 1


def estimator_of(lens: LensConfig) -> Estimator:
    """The estimator that a lens is trained with."""
    several = lens.estimator in FEWEST_SAMPLES
    return Estimator(lens.estimator, lens.estimator_samples if several else 1)
