"""What sampled texts add to the support of claims: how many of them must agree?

The share of K samples that state a claim is calibrated like the decoder's probability
(:mod:`~conlens_jax.evaluation.studies.support`): fitted on one half of the held-out documents and
tested on the other. Claims of the greedy text and others are calibrated apart: of claims on which
equally many samples agree, those of the greedy text are right more often.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from conlens_jax.evaluation.studies.claims import Checked, ClaimTruth, checked_claims
from conlens_jax.evaluation.studies.support import (
    Scored,
    fit,
    in_test_half,
    reliability,
    support_metrics,
    supports_of,
)
from conlens_jax.evaluation.suite import Suite
from conlens_jax.evaluation.support import LEAST_SHARE, Calibration, SampleKnots
from conlens_jax.measurement.aggregates import doublings, ratio_of
from conlens_jax.measurement.bootstrap import Interval
from conlens_jax.measurement.runner import SwapEffect

FEWEST = 4
"""The fewest samples whose agreement is calibrated, if there are more."""
WITH, ONLY = "with", "only"
"""Claims of the greedy text, with what the samples add; claims of the samples only."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """C distinct claims of the greedy text and of K sampled texts of each row.

    Attributes:
      claims: one of each.
      support_C: of claims of the greedy text, by the decoder's probability; NaN for others.
      states_CK: whether a sample states it.
    """

    claims: Sequence[Checked]
    support_C: np.ndarray
    states_CK: np.ndarray

    @staticmethod
    def of(
        greedy: Sequence[Checked], support_G: np.ndarray, samples: Sequence[Sequence[Checked]]
    ) -> Agreement:
        """From the claims of the greedy texts, the support of each, and the claims of each sample
        of all rows."""
        key = lambda c: (c.row, c.claim.kind, c.claim.says)
        supports: dict[tuple, float] = {}
        for claim, support in zip(greedy, support_G.tolist(), strict=True):
            supports[key(claim)] = max(support, supports.get(key(claim), 0.0))
        first: dict[tuple, Checked] = {}
        for claim in itertools.chain(greedy, *samples):
            first.setdefault(key(claim), claim)
        stated = [set(map(key, checked)) for checked in samples]
        states = [[name in sample for sample in stated] for name in first]
        return Agreement(
            list(first.values()),
            np.array([supports.get(name, np.nan) for name in first]),
            np.array(states, bool).reshape(len(first), len(samples)),
        )

    def of_first(self, k: int) -> dict[str, Scored]:
        """The claims scored by the first k samples, as :class:`SampleKnots` are fitted to them."""
        share_C, is_greedy_C = self.states_CK[:, :k].mean(axis=1), ~np.isnan(self.support_C)
        score_C = np.where(is_greedy_C, (self.support_C + share_C) / 2, share_C)
        every = Scored(
            kind_C=np.array([c.claim.kind for c in self.claims], object),
            row_C=np.array([c.row for c in self.claims], np.int64),
            right_C=np.array([c.is_right for c in self.claims], bool),
            score_C=score_C,
        )
        return {WITH: every.take(is_greedy_C), ONLY: every.take(~is_greedy_C & (share_C > 0))}


def sizes(most: int) -> list[int]:
    """The numbers of samples whose agreement is calibrated: 4, 8, … and the most."""
    return [k for k in doublings(most) if k >= FEWEST] or [most]


def agreement_of_claims(
    suite: Suite,
    truth: ClaimTruth,
    clean: SwapEffect,
    greedy: list[Checked],
    log_probs_NT: np.ndarray,
    samples_KNT: Sequence[np.ndarray],
    calibration: Calibration,
    *,
    is_fitted: bool,
) -> tuple[Calibration, dict[str, Interval]]:
    """The calibration with the agreement of samples, and metrics of it.

    These are those of :func:`~.support.support_metrics` by number of samples: of the greedy texts'
    claims (``support_ece_with_16_samples``), and of other claims, if a reader is shown them
    (:data:`LEAST_SHARE`; ``support_ece_only_16_samples``). ``support_gain_16_samples``: by how much
    the samples lower the mean squared error of the support of the greedy texts' claims.

    Args:
      greedy: the claims of the greedy texts.
      log_probs_NT: the decoder's log-probabilities of these texts.
      samples_KNT: K sampled texts of all rows.
      calibration: of the same lens.
      is_fitted: it was fitted on other documents: its agreement is tested on all of these.
    """
    supports_G = supports_of(calibration, Scored.of(greedy, log_probs_NT))
    known = [c for c, s in zip(greedy, supports_G, strict=True) if not np.isnan(s)]
    samples = [checked_claims(suite, truth, clean, texts_NT) for texts_NT in samples_KNT]
    agreement = Agreement.of(known, supports_G[~np.isnan(supports_G)], samples)
    is_test_N = in_test_half(suite.rows.documents_N) | is_fitted
    fitted = dict(calibration.agreement)
    metrics: dict[str, Interval] = {}
    tables = dict(calibration.measured.get("reliability", {}))
    for k in sorted(fitted) if is_fitted else sizes(len(samples_KNT)):
        scored = agreement.of_first(k)
        if not is_fitted:
            fitted[k] = SampleKnots(
                *(fit(scored[what].take(~is_test_N[scored[what].row_C])) for what in (WITH, ONLY))
            )
        for what, knots in zip((WITH, ONLY), fitted[k], strict=True):
            claims = scored[what]
            shown_C = claims.score_C >= (LEAST_SHARE if what == ONLY else 0)
            is_known_C = np.isin(claims.kind_C, list(knots))
            claims = claims.take(is_test_N[claims.row_C] & shown_C & is_known_C)
            if len(claims.kind_C):
                support_C = supports_of(Calibration({}, knots), claims)
                metrics |= support_metrics(suite, claims, support_C, f"_{what}_{k}_samples")
                tables[f"{what}_samples"] = reliability(support_C, claims.right_C)
        metrics |= _gain(suite, agreement, fitted[k], k, is_test_N)
    calibration = calibration.with_facts({"reliability": tables})
    return dataclasses.replace(calibration, agreement=fitted), metrics


def _gain(
    suite: Suite, agreement: Agreement, knots: SampleKnots, k: int, is_test_N: np.ndarray
) -> dict[str, Interval]:
    claims = agreement.of_first(k)[WITH]
    alone_C = agreement.support_C[~np.isnan(agreement.support_C)]
    chosen_C = is_test_N[claims.row_C] & np.isin(claims.kind_C, list(knots.stated))
    claims, alone_C = claims.take(chosen_C), alone_C[chosen_C]
    if not len(alone_C):
        return {}
    support_C = supports_of(Calibration({}, knots.stated), claims)
    gain_C = np.square(alone_C - claims.right_C) - np.square(support_C - claims.right_C)
    n_rows = len(suite.rows)
    per_row = {
        "gain": np.bincount(claims.row_C, gain_C, n_rows),
        "claims": np.bincount(claims.row_C, minlength=n_rows).astype(np.float64),
    }
    return suite.intervals({f"support_gain_{k}_samples": ratio_of("gain", "claims")}, per_row)
