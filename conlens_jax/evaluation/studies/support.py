"""Fitting the support of claims on one half of the held-out documents, and testing it on the other.

Claims of greedy texts. Nothing of the other half, not even a threshold, depends on its claims.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Hashable

import numpy as np
from sklearn.isotonic import IsotonicRegression

from conlens_jax.evaluation.claims import ClaimReader
from conlens_jax.evaluation.studies.claims import Checked
from conlens_jax.evaluation.suite import PerRow, Suite
from conlens_jax.evaluation.support import Calibration, score_of
from conlens_jax.measurement.aggregates import Means, ratio, ratio_of
from conlens_jax.measurement.bootstrap import Interval, Statistic

BINS = 10
LEVELS = (0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class Scored:
    """C claims of N rows.

    Attributes:
      kind_C, row_C, right_C: of each claim its kind, its row, and whether it is right.
      score_C: the decoder's probability of it.
    """

    kind_C: np.ndarray
    row_C: np.ndarray
    right_C: np.ndarray
    score_C: np.ndarray

    @staticmethod
    def of(checked: list[Checked], log_probs_NT: np.ndarray) -> Scored:
        """Claims with their scores, from the log-probabilities of the texts that they are in."""
        return Scored(
            kind_C=np.array([c.claim.kind for c in checked], object),
            row_C=np.array([c.row for c in checked], np.int64),
            right_C=np.array([c.is_right for c in checked], bool),
            score_C=np.array([score_of(c.claim, log_probs_NT[c.row]) for c in checked]),
        )

    def take(self, mask_C: np.ndarray) -> Scored:
        """The claims of a mask."""
        return Scored(*(getattr(self, f.name)[mask_C] for f in dataclasses.fields(self)))


def in_test_half(documents_N: np.ndarray) -> np.ndarray:
    """Which rows are of the half that the support is tested on: a document is in the same half in
    every evaluation."""
    documents, group_N = np.unique(documents_N, return_inverse=True)
    digest = lambda document: hashlib.sha256(str(document).encode()).digest()
    return np.array([digest(d)[0] % 2 == 1 for d in documents.tolist()])[group_N]


def fit(claims: Scored) -> dict[str, tuple[tuple[float, float], ...]]:
    """The knots of :class:`Calibration`: isotonic regression by kind of claim.

    A wrong claim is added at the highest score and a right one at the lowest, so that a few claims
    of a kind cannot make a support of 0 or 1.
    """
    knots = {}
    for kind in sorted(set(claims.kind_C)):
        of_kind = claims.take(claims.kind_C == kind)
        score = of_kind.score_C
        fitted = IsotonicRegression(y_min=0, y_max=1).fit(
            np.concatenate([score, [score.min(), score.max()]]),
            np.concatenate([of_kind.right_C.astype(np.float64), [1.0, 0.0]]),
        )
        thresholds = (fitted.X_thresholds_, fitted.y_thresholds_)
        knots[kind] = tuple(zip(*(values.tolist() for values in thresholds), strict=True))
    return knots


def said_by_rows(checked: list[Checked]) -> dict[str, dict[Hashable, int]]:
    """Kind → claim → the number of rows whose text states it, most frequent first."""
    distinct = {(c.row, c.claim.kind, c.claim.says) for c in checked}
    said: dict[str, dict[Hashable, int]] = {}
    # Equal counts in the order of their names, so that the file is the same again.
    counts = Counter((kind, says) for _, kind, says in distinct).items()
    for (kind, says), count in sorted(counts, key=lambda item: (-item[1], str(item[0]))):
        said.setdefault(kind, {})[says] = count
    return said


def supports_of(calibration: Calibration, claims: Scored) -> np.ndarray:
    """The support of each claim, [C]; NaN for a kind that the calibration does not know."""
    pairs = zip(claims.kind_C, claims.score_C.tolist(), strict=True)
    return np.array([calibration.support(kind, score) for kind, score in pairs], np.float64)


def equal_bins(support_C: np.ndarray) -> np.ndarray:
    """The bin of each claim: up to :data:`BINS` of equal counts by support; equal supports are in
    one bin."""
    edges = np.quantile(support_C, np.arange(1, BINS) / BINS)
    return np.searchsorted(np.unique(edges), support_C, side="right")


def reliability(support_C: np.ndarray, right_C: np.ndarray) -> list[dict[str, float]]:
    """Of the claims of each bin: their count, mean support, and the share that is right."""
    bin_C = equal_bins(support_C)
    return [
        {
            "claims": int(np.sum(bin_C == b)),
            "support": float(support_C[bin_C == b].mean()),
            "right": float(right_C[bin_C == b].mean()),
        }
        for b in np.unique(bin_C)
    ]


def support_of_claims(
    suite: Suite,
    reader: ClaimReader,
    checked: list[Checked],
    log_probs_NT: np.ndarray,
    fitted: Calibration | None = None,
) -> tuple[Calibration | None, dict[str, Interval]]:
    """The calibration of a lens, and its metrics; none if there are no claims to fit or to test.

    The metrics are those of :func:`support_metrics`, over all kinds of claim and, if there are
    several, by kind (``support_ece_next``).

    Args:
      checked: the claims of the greedy texts.
      log_probs_NT: the decoder's log-probabilities of these texts.
      fitted: a calibration that was fitted on other documents: it is tested on all of these.
    """
    claims, measured = Scored.of(checked, log_probs_NT), {}
    if fitted is None:
        is_test_C = in_test_half(suite.rows.documents_N)[claims.row_C]
        fitted = Calibration(
            reader.to_json(),
            fit(claims.take(~is_test_C)),
            said=said_by_rows(checked),
            said_rows=len(suite.rows),
        )
        claims, measured = claims.take(is_test_C), {"fitted_claims": int(np.sum(~is_test_C))}
    tested = claims.take(np.isin(claims.kind_C, list(fitted.knots)))
    if not len(tested.kind_C):
        return None, {}
    support_C = supports_of(fitted, tested)
    metrics, tables = {}, {}
    kinds = sorted(set(tested.kind_C))
    for kind in ["", *(kinds if len(kinds) > 1 else ())]:
        mask_C = np.isin(tested.kind_C, [kind] if kind else kinds)
        chosen = tested.take(mask_C)
        metrics |= support_metrics(suite, chosen, support_C[mask_C], f"_{kind}" if kind else "")
        tables[kind or "all"] = reliability(support_C[mask_C], chosen.right_C)
    return fitted.with_facts({**measured, "reliability": tables}), metrics


def support_metrics(
    suite: Suite, claims: Scored, support_C: np.ndarray, suffix: str = ""
) -> dict[str, Interval]:
    """How far the support of claims can be trusted.

    ``support_ece``: expected calibration error, the mean over the claims of the difference between
    the mean support of their bin and the share of its claims that is right. ``support_right_at_90``
    and ``support_share_at_90``: of the claims with a support of at least 0.9, the share that is
    right; and their share of all claims. A resample keeps the bins.
    """
    per_row: PerRow = {}
    n_rows = len(suite.rows)

    def count(name: str, values_C: np.ndarray) -> str:
        per_row[name] = np.bincount(claims.row_C, values_C, n_rows)
        return name

    total = count("claims", np.ones(len(support_C)))
    bin_C = equal_bins(support_C)
    excess = [
        count(f"excess_{b}", (bin_C == b) * (support_C - claims.right_C)) for b in np.unique(bin_C)
    ]

    def calibration_error(means: Means) -> np.ndarray:
        return ratio(sum(np.abs(means[name]) for name in excess), means[total])

    statistics: dict[str, Statistic] = {f"support_ece{suffix}": calibration_error}
    for level in LEVELS:
        above_C = support_C >= level
        name = f"{level * 100:.0f}{suffix}"
        said = count(f"at_{name}", above_C)
        right = count(f"right_at_{name}", above_C & claims.right_C)
        statistics[f"support_right_at_{name}"] = ratio_of(right, said)
        statistics[f"support_share_at_{name}"] = ratio_of(said, total)
    return suite.intervals(statistics, per_row)
