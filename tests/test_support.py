"""Support: fitted and tested on hand-made claims whose calibration is known."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest

from conlens_jax.config import WarmConfig
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.claims import Claim
from conlens_jax.evaluation.studies import support as study
from conlens_jax.evaluation.studies.claims import Checked
from conlens_jax.evaluation.studies.support import Scored, equal_bins, fit, in_test_half
from conlens_jax.evaluation.suite import Suite
from conlens_jax.evaluation.support import Calibration, SampleKnots, score_of

N = 4000


def scored(scores, right, kind="next", rows=None) -> Scored:
    n = len(scores)
    rows = np.arange(n) if rows is None else rows
    return Scored(np.full(n, kind, object), rows, np.asarray(right, bool), np.asarray(scores))


def suite_of(n_rows: int, measurer=None) -> Suite:
    rows = Rows(
        np.zeros((n_rows, 2), np.float32),
        np.zeros((n_rows, 4), np.int32),
        np.zeros(n_rows, np.int32),
        np.full(n_rows, 4, np.int32),
        np.arange(n_rows) // 2,
    )
    return Suite.make(measurer, rows, None, WarmConfig(), frozenset(), n_resamples=50, seed=0)


def test_the_score_is_the_product_over_the_words_pieces():
    log_probs = np.log(np.array([0.5, 0.25, 0.8, 0.9], np.float32))
    assert score_of(Claim("context", "fox", (1, 2)), log_probs) == pytest.approx(0.2)


def test_isotonic_regression_by_hand():
    # Pooled: 0.2 and 0.4 (right, wrong), with the added right claim at 0.1 and wrong one at 0.8.
    claims = scored([0.1, 0.2, 0.4, 0.6, 0.8], [False, True, False, True, True])
    calibration = Calibration({}, fit(claims))
    support = lambda score: calibration.support("next", score)
    assert support(0.1) == support(0.3) == pytest.approx(2 / 4)
    assert support(0.6) == support(0.99) == pytest.approx(2 / 3)
    assert 0.5 < support(0.5) < 2 / 3  # linear in between
    assert support(0.0) == support(0.1)
    assert calibration.support("context", 0.9) is None


def test_a_few_claims_do_not_make_certainty():
    calibration = Calibration({}, fit(scored([0.7, 0.8, 0.9], [True, True, True])))
    assert calibration.support("next", 0.99) == pytest.approx(4 / 5)


def test_kinds_are_fitted_apart():
    first, second = scored([0.5] * 9, [True] * 9), scored([0.5] * 9, [False] * 9, "context")
    both = Scored(
        *map(np.concatenate, zip(*map(dataclasses.astuple, (first, second)), strict=True))
    )
    calibration = Calibration({}, fit(both))
    assert calibration.support("next", 0.5) == pytest.approx(10 / 11)
    assert calibration.support("context", 0.5) == pytest.approx(1 / 11)


@pytest.fixture(scope="module")
def known():
    """Claims that are right with probability score²."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=N)
    return scores, rng.uniform(size=N) < scores**2


def test_calibration_error_of_a_true_and_of_a_wrong_probability(known):
    scores, right = known
    suite, claims = suite_of(N), scored(*known)
    error = lambda support: study.support_metrics(suite, claims, support)["support_ece"]
    assert error(scores**2).value < 0.03 < error(scores).lo
    # The mean of |x − x²| over (0, 1).
    assert error(scores).value == pytest.approx(1 / 6, abs=0.02)
    plain = sum(
        np.sum(b) * abs(scores[b].mean() - right[b].mean())
        for b in (equal_bins(scores) == i for i in range(10))
    )
    assert error(scores).value == pytest.approx(plain / N)
    assert np.unique(np.bincount(equal_bins(scores))).tolist() == [N // 10]


def test_precision_and_coverage_of_the_levels(known):
    scores, right = known
    found = study.support_metrics(suite_of(N), scored(*known), scores, "_next")
    for level in (50, 70, 90):
        above = scores >= level / 100
        expected = right[above].mean()
        assert found[f"support_right_at_{level}_next"].value == pytest.approx(expected)
        assert found[f"support_share_at_{level}_next"].value == pytest.approx(above.mean())


def test_equal_supports_share_a_bin():
    table = study.reliability(np.array([0.2] * 30 + [0.9] * 5), np.array([True] * 6 + [False] * 29))
    assert table == [
        {"claims": 30, "support": pytest.approx(0.2), "right": pytest.approx(0.2)},
        {"claims": 5, "support": pytest.approx(0.9), "right": 0.0},
    ]


def test_halves_are_of_documents_and_always_the_same():
    documents = np.arange(1000) // 3
    half = in_test_half(documents)
    assert all(len(set(half[documents == d])) == 1 for d in range(333))
    assert 0.4 < half.mean() < 0.6
    np.testing.assert_array_equal(in_test_half(documents[::-1]), half[::-1])


def checked_rows(is_right_N) -> list[Checked]:
    return [Checked(Claim("next", 0, (0,)), row, bool(r)) for row, r in enumerate(is_right_N)]


READER = types.SimpleNamespace(to_json=lambda: {"comma": 1})


def test_one_half_is_fitted_and_the_other_tested(known):
    """In the half that is fitted all claims are right, in the other one all are wrong."""
    log_probs, suite = np.log(known[0][:200, None]), suite_of(200)
    is_test = in_test_half(suite.rows.documents_N)
    calibration, metrics = study.support_of_claims(suite, READER, checked_rows(~is_test), log_probs)
    assert calibration.support("next", 0.5) > 0.9
    assert metrics["support_ece"].value > 0.9
    assert metrics["support_right_at_90"].value == 0 < metrics["support_share_at_90"].value
    assert calibration.claims == {"comma": 1}
    assert sum(b["claims"] for b in calibration.measured["reliability"]["all"]) == is_test.sum()
    assert calibration.rate("next", 0) == 1.0  # all rows state it, those of either half


def test_a_calibration_of_other_documents_is_tested_on_all(known):
    log_probs, suite = np.log(known[0][:200, None]), suite_of(200)
    fitted = Calibration({}, {"next": ((0.0, 0.25), (1.0, 0.25))})
    right = np.arange(200) % 2 == 0
    found, metrics = study.support_of_claims(suite, READER, checked_rows(right), log_probs, fitted)
    assert found.knots == fitted.knots and metrics["support_ece"].value == pytest.approx(0.25)
    assert found.measured["reliability"]["all"] == [{"claims": 200, "support": 0.25, "right": 0.5}]


CALIBRATION = Calibration(
    {"comma": 1, "separator": 2},
    {"next": ((0.1, 0.3), (0.9, 0.95)), "context": ((0.5, 0.2),)},
    {"fitted_claims": 3, "checkpoint_step": 7},
    {4: SampleKnots({"next": ((0.0, 0.0), (1.0, 0.5))}, {"next": ((0.25, 0.1), (1.0, 0.8))})},
    {"next": {12: 30, 5: 1}, "context": {"fox": 2}, "fact": {("animal", 7): 4}},
    100,
)


def test_it_is_read_as_it_was_written(tmp_path):
    assert Calibration.read(tmp_path) is None
    CALIBRATION.write(tmp_path)
    assert Calibration.read(tmp_path) == Calibration.of_step(tmp_path, 7) == CALIBRATION
    assert Calibration.of_step(tmp_path, 8) is None


def test_a_file_without_agreement_and_counts_is_read(tmp_path):
    CALIBRATION.write(tmp_path)
    file = tmp_path / "support.json"
    values = json.loads(file.read_text())
    for name in ("agreement", "said", "said_rows"):
        del values[name]
    file.write_text(json.dumps(values))
    found = Calibration.read(tmp_path)
    assert found.knots == CALIBRATION.knots and found.rate("next", 12) is None
    assert found.with_samples("next", None, 1.0, 4) is None


def test_rates_and_shares_of_samples():
    assert CALIBRATION.rate("fact", ("animal", 7)) == 0.04
    assert CALIBRATION.rate("next", 99) == CALIBRATION.rate("other", "x") == 0.01
    assert CALIBRATION.with_samples("next", None, 0.625, 4) == pytest.approx(0.45)
    assert CALIBRATION.with_samples("next", 0.8, 0.6, 4) == pytest.approx(0.35)
    assert CALIBRATION.with_samples("context", None, 0.5, 4) is None
    assert CALIBRATION.with_samples("next", None, 0.5, 8) is None
    assert CALIBRATION.with_samples("next", 0.8, 0.5, 8) == 0.8


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"knots": {"next": []}},
        {"knots": [1]},
        {"claims": 1},
        {"said": {"next": [3]}},
    ],
)
def test_another_file_is_refused_by_name(tmp_path, change):
    CALIBRATION.write(tmp_path)
    file = tmp_path / "support.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=r"support\.json has no calibration of claims"):
        Calibration.read(tmp_path)


def test_tokens_have_the_support_of_their_claim():
    claims = [Claim("next", 0, (0,)), Claim("context", "fox", (2, 3)), Claim("fact", 1, (4,))]
    reader = types.SimpleNamespace(of=lambda tokens: claims)
    log_probs = np.log([0.1, 0.5, 0.5, 0.5, 0.5, 0.5])
    found = CALIBRATION.of_tokens(reader, (5, 6, 7, 8, 9), log_probs)
    assert found == [pytest.approx(0.3), None, pytest.approx(0.2), pytest.approx(0.2), None]
