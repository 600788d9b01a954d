"""A warning if the text no longer depends on the activation, with settings to try."""

from __future__ import annotations

import numpy as np

from conlens_jax.config import ExperimentConfig
from conlens_jax.measurement.aggregates import fve_nrm_of
from conlens_jax.measurement.bootstrap import DocumentBootstrap

_RESAMPLES = 400


def collapse_warning(
    cos_N: np.ndarray,
    shuffled_cos_N: np.ndarray,
    documents_N: np.ndarray,
    resultant: float,
    config: ExperimentConfig,
) -> str:
    """A warning if the FVE of the sampled text is within the interval of another row's text, or
    below it; else empty.

    Args:
      cos_N, shuffled_cos_N: cosine of each activation with the reconstruction from its own text,
        and with that from another row's.
      documents_N: document of each row, the unit of resampling.
      resultant: R of the training rows (:func:`~conlens_jax.measurement.metrics.resultant_length`).
    """
    bootstrap = DocumentBootstrap.draw(documents_N, _RESAMPLES, seed=0)
    fve_of = lambda cos: bootstrap.interval(fve_nrm_of("cos", resultant), {"cos": cos})
    own, shuffled = fve_of(cos_N).value, fve_of(shuffled_cos_N)
    # A single document has no interval: the values themselves are compared.
    highest = shuffled.hi if np.isfinite(shuffled.hi) else shuffled.value
    if own > highest:
        return ""
    return (
        f"the text does not depend on the activation: fve_nrm {own:.3f} is within what another "
        f"row's text gives ({shuffled.lo:.3f} to {shuffled.hi:.3f}). "
        f"Try {', or '.join(_remedies(config))}."
    )


def _remedies(config: ExperimentConfig) -> list[str]:
    """Settings against collapse that this run does not use yet, the most likely cause first."""
    loss, lens = config.loss, config.lens
    remedies = []
    if loss.lm.start > 0 or loss.lm.end > 0:
        remedies.append(f"a smaller loss.lm (now {max(loss.lm.start, loss.lm.end):g})")
    if loss.text.start == 0 and loss.text.end == 0:
        remedies.append("the anchor loss.text=1")
    if not lens.dual_path and (loss.kl.start > 0 or loss.kl.end > 0):
        remedies.append("lens.dual_path=True, or a smaller loss.kl")
    remedies.append("a longer warm start (warm.steps)")
    return remedies
