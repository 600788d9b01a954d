"""The claims of a lens's texts: how many are right, and how far each can be believed."""

from __future__ import annotations

import numpy as np

from conlens_jax.evaluation.studies.agreement import agreement_of_claims
from conlens_jax.evaluation.studies.claims import ClaimTruth, checked_claims, truth_of_claims
from conlens_jax.evaluation.studies.support import support_of_claims
from conlens_jax.evaluation.suite import Evaluated, Suite
from conlens_jax.evaluation.support import Calibration
from conlens_jax.measurement.bootstrap import Interval
from conlens_jax.models.param_table import Params


def measured_claims(
    suite: Suite,
    truth: ClaimTruth,
    evaluated: Evaluated,
    trainable: Params,
    frozen: Params,
    *,
    known: Calibration | None,
    samples: int,
) -> tuple[Calibration | None, dict[str, Interval], np.ndarray]:
    """The calibration of a lens's claims, their metrics, and the log-probabilities of the greedy
    texts [N, T].

    Args:
      known: the calibration of other documents, which is tested then.
      samples: texts per row whose agreement is calibrated as well, or tested with as many as
        ``known`` has; 0: none.
    """
    texts, clean = evaluated.explained.texts, evaluated.effects["clean"]
    claims = checked_claims(suite, truth, clean, texts["greedy"])
    metrics = truth_of_claims(suite, truth, evaluated, claims)
    measurer, rows = suite.measurer, suite.rows
    log_probs_NT = measurer.text_log_probs(trainable, frozen, rows, texts["greedy"])
    found, support = support_of_claims(suite, truth.reader, claims, log_probs_NT, known)
    metrics |= support
    if samples and known is not None:
        samples = max(known.agreement, default=0)
    if found is not None and samples:
        draws = range(1, samples)  # the texts of draw 0 are there already
        sampled = [measurer.sample(trainable, frozen, rows, draw)[0] for draw in draws]
        found, agreement = agreement_of_claims(
            *(suite, truth, clean, claims, log_probs_NT),
            [texts["sampled"], *sampled],
            found,
            is_fitted=known is not None,
        )
        metrics |= agreement
    return found, metrics, log_probs_NT
