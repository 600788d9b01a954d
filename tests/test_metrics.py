"""Metrics against numbers worked out by hand and identities; the bootstrap against theory."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from conlens_jax.measurement import metrics
from conlens_jax.measurement.bootstrap import DocumentBootstrap

TABLES = Path(__file__).parents[1] / "third_party" / "metric_tables"


def _activations(n=200, d=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * 3 + np.linspace(-2, 4, d)


def test_cosine_by_hand_and_for_zero_and_extreme_vectors():
    a = [[3, 4], [1, 0], [0, 0], [1e300, 1e300], [1e-200, 0], [2, 2]]
    b = [[4, 3], [-2, 0], [1, 1], [1e300, 0], [5e-200, 0], [0, 0]]
    expected = [0.96, -1, 0, math.sqrt(0.5), 1, 0]
    np.testing.assert_allclose(metrics.cosine(a, b), expected, rtol=1e-14, atol=0)


def test_unit_vectors_keep_zero_rows():
    np.testing.assert_allclose(
        metrics.unit_vectors([[3, -4], [0, 0]]), [[0.6, -0.8], [0, 0]], rtol=1e-15
    )


def test_mse_nrm_is_the_squared_distance_of_unit_vectors():
    a, b = _activations(seed=1), _activations(seed=2)
    distance = np.sum((metrics.unit_vectors(a) - metrics.unit_vectors(b)) ** 2, axis=1)
    np.testing.assert_allclose(metrics.mse_nrm(metrics.cosine(a, b)), distance, rtol=1e-12)


def test_resultant_length_by_hand_ignores_scale_and_is_not_renormalised():
    assert metrics.resultant_length([[5, 0], [0, 0.1]]) == pytest.approx(math.sqrt(0.5), rel=1e-15)
    assert metrics.resultant_length([[1, 0], [-7, 0]]) == 0
    assert metrics.resultant_length([[2, 0], [9, 0]]) == 1


def test_one_minus_r_squared_is_the_spread_of_the_unit_vectors():
    unit = metrics.unit_vectors(_activations())
    spread = np.mean(np.sum((unit - unit.mean(axis=0)) ** 2, axis=1))
    R = metrics.resultant_length(_activations())
    assert metrics.fve_nrm_reference(R) == pytest.approx(spread, rel=1e-12)


def test_fve_nrm_identities():
    a = _activations()
    R = metrics.resultant_length(a)
    assert metrics.fve_nrm(np.ones(len(a)), R) == 1
    # Constant guess at the best direction: mean cos = R, hence 1 − 2(1 − R)/(1 − R²).
    guess = np.broadcast_to(metrics.unit_vectors(a).mean(axis=0), a.shape)
    cos = metrics.cosine(guess, a)
    assert cos.mean() == pytest.approx(R, rel=1e-12)
    assert metrics.fve_nrm(cos, R) == pytest.approx(-(1 - R) / (1 + R), rel=1e-10)
    assert metrics.fve_nrm(np.full(3, (1 + R * R) / 2), R) == pytest.approx(0, abs=1e-14)
    # By hand: mean mse = 2·(1 − 0.75) = 0.5, reference 1 − 0.36 = 0.64.
    assert metrics.fve_nrm([0.5, 1.0], 0.6) == pytest.approx(1 - 0.5 / 0.64, rel=1e-14)


def test_kl_frac_is_a_ratio_of_means_not_a_mean_of_ratios():
    assert metrics.kl_frac([1, 1], [0.5, 9.5]) == pytest.approx(0.8)
    assert metrics.kl_frac([2, 3], [2, 3]) == 0
    assert metrics.kl_frac([0, 0], [2, 3]) == 1


def test_cross_entropy_recovered():
    assert metrics.cross_entropy_recovered(6.0, 3.0, 2.0) == 0.75
    assert metrics.cross_entropy_recovered(6.0, 6.0, 2.0) == 0
    assert metrics.cross_entropy_recovered(6.0, 2.0, 2.0) == 1
    np.testing.assert_allclose(
        metrics.cross_entropy_recovered([4, 6], [3, 7], [2, 2]), [0.5, -0.25]
    )


def test_metrics_without_a_value_are_nan_and_do_not_warn():
    assert math.isnan(metrics.kl_frac([1.0], [0.0]))
    assert math.isnan(metrics.fve_nrm([0.5], 1.0))
    assert math.isnan(metrics.cross_entropy_recovered(2.0, 3.0, 2.0))
    assert math.isnan(metrics.distinct_2([[4], []]))


def test_top1_agreement_a_row():
    np.testing.assert_array_equal(metrics.top1_agreement([1, 2, 3], [1, 9, 3]), [1, 0, 1])
    np.testing.assert_array_equal(
        metrics.top1_agreement([[1, 2], [3, 4]], [[1, 9], [3, 4]]), [0.5, 1]
    )


def test_text_statistics_by_hand():
    # Bigrams 12 21 12 | 12 23: three different of five; none crosses from one text to the next.
    assert metrics.distinct_2([[1, 2, 1, 2], [1, 2, 3]]) == pytest.approx(3 / 5)
    # 4-grams of six equal tokens: three, all the same. Period two, six tokens: 1212 2121 1212.
    repeats = metrics.repeat_4gram([[7] * 6, [1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5], [1, 1, 1]])
    np.testing.assert_allclose(repeats, [2 / 3, 1 / 3, 0, 0])
    assert metrics.distinct_2(np.array([[1, 2, 3]])) == 1


def mean_interval(bootstrap: DocumentBootstrap, values, level: float = 0.95):
    return bootstrap.interval(lambda means: means["x"], {"x": values}, level)


def two_rows() -> DocumentBootstrap:
    return DocumentBootstrap.draw([0, 1], 10, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.cosine([[1.0, 2.0]], [[1.0]]),
        lambda: metrics.cosine([1.0], [1.0]),
        lambda: metrics.fve_nrm([0.5], 1.5),
        lambda: metrics.fve_nrm([], 0.5),
        lambda: metrics.squared_error([[1.0, 2.0], [1.0, 2.0]], [[1.0], [1.0]]),
        lambda: metrics.top1_agreement([1, 2], [1]),
        lambda: DocumentBootstrap.draw([], 10, 0),
        lambda: DocumentBootstrap.draw([0], 0, 0),
        lambda: mean_interval(two_rows(), [1.0]),
        lambda: two_rows().interval(lambda means: means["x"].mean(), {"x": [1.0, 2.0]}),
        lambda: mean_interval(two_rows(), [1.0, 2.0], level=95),
    ],
)
def test_bad_input_raises_value_error(call):
    with pytest.raises(ValueError):
        call()


# --- bootstrap ----------------------------------------------------------------------------------


def test_value_is_the_statistic_on_the_data_for_unequal_documents():
    rng = np.random.default_rng(0)
    documents = rng.integers(0, 9, size=50)
    kl, ref = rng.uniform(size=50), 3 + rng.uniform(size=50)
    interval = DocumentBootstrap.draw(documents, n_resamples=500, seed=3).interval(
        lambda mean: metrics.fraction_removed(mean["kl"], mean["ref"]), {"kl": kl, "ref": ref}
    )
    assert interval.value == pytest.approx(metrics.kl_frac(kl, ref), rel=1e-12)
    assert interval.lo < interval.value < interval.hi


def test_resampled_means_equal_means_over_the_repeated_rows():
    documents = np.array(["b", "a", "b", "c"])
    values = np.array([1.0, 5.0, 2.0, 11.0])
    bootstrap = DocumentBootstrap.draw(documents, 40, seed=1)
    means = bootstrap.means({"x": values})["x"]
    names = np.unique(documents)
    assert bootstrap.counts_RG[1:].sum(axis=1).tolist() == [3.0] * 40
    for counts, mean in zip(bootstrap.counts_RG, means, strict=True):
        times = {name: int(count) for name, count in zip(names, counts, strict=True)}
        rows = np.repeat(values, [times[document] for document in documents])
        assert mean == pytest.approx(rows.mean(), rel=1e-12)


def test_width_agrees_with_the_normal_interval_on_iid_rows():
    values = np.random.default_rng(5).normal(2.0, 1.0, size=400)
    interval = mean_interval(DocumentBootstrap.draw(np.arange(400), 4000, seed=0), values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.hi - interval.value == pytest.approx(half, rel=0.08)
    assert interval.value - interval.lo == pytest.approx(half, rel=0.08)


def test_coverage_is_near_the_level():
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(300):
        per_document = rng.normal(1.0, 1.0, size=60)
        values = np.repeat(per_document, 2) + rng.normal(size=120) * 0.5
        interval = mean_interval(
            DocumentBootstrap.draw(np.repeat(np.arange(60), 2), 400, seed=trial), values
        )
        covered += interval.lo <= 1.0 <= interval.hi
    assert 0.90 <= covered / 300 <= 0.98


def test_documents_are_the_unit_so_repeated_rows_do_not_narrow_the_interval():
    values = np.random.default_rng(2).normal(size=50)
    once = mean_interval(DocumentBootstrap.draw(np.arange(50), 1000, seed=4), values)
    copies = DocumentBootstrap.draw(np.repeat(np.arange(50), 20), 1000, seed=4)
    repeated = mean_interval(copies, np.repeat(values, 20))
    assert repeated.lo == pytest.approx(once.lo, rel=1e-12)
    assert repeated.hi == pytest.approx(once.hi, rel=1e-12)


def test_paired_difference_cancels_what_the_systems_share():
    rng = np.random.default_rng(8)
    hard = rng.normal(size=300) * 10
    warm, joint = {"x": hard}, {"x": hard + 0.3 + rng.normal(size=300) * 0.1}
    documents = np.arange(300)

    def mean(means):
        return means["x"]

    bootstrap = DocumentBootstrap.draw(documents, 1000, seed=0)
    difference = bootstrap.difference(mean, joint, warm)
    alone = bootstrap.interval(mean, joint)
    assert difference.value == pytest.approx((joint["x"] - hard).mean(), rel=1e-9)
    assert 0 < difference.lo < difference.value < difference.hi
    assert difference.hi - difference.lo < (alone.hi - alone.lo) / 20
    same = bootstrap.difference(mean, warm, warm)
    assert (same.value, same.lo, same.hi) == (0, 0, 0)


def test_seed_decides_the_resamples():
    values, documents = np.random.default_rng(0).normal(size=30), np.arange(30)
    of_seed = lambda seed: mean_interval(DocumentBootstrap.draw(documents, 50, seed), values)
    first, again, other = map(of_seed, (1, 1, 2))
    assert first == again
    assert first.value == other.value and first.lo != other.lo


def test_non_finite_rows_give_no_interval_and_no_warning():
    for bad in (math.nan, math.inf):
        interval = mean_interval(DocumentBootstrap.draw([0, 1, 2], 50, seed=0), [1.0, bad, 2.0])
        assert not math.isfinite(interval.value)
        assert math.isnan(interval.lo) and math.isnan(interval.hi)


def test_ratio_that_is_infinite_in_some_resamples_keeps_its_lower_end():
    rows = {"own": np.ones(40), "other": np.arange(40) < 1}
    bootstrap = DocumentBootstrap.draw(np.arange(40), 500, seed=0)

    def ratio(means):
        with np.errstate(divide="ignore"):
            return means["own"] / means["other"]

    interval = bootstrap.interval(ratio, rows)
    assert interval.value == pytest.approx(40) and interval.hi == math.inf
    assert 5 < interval.lo < 40


def test_wider_level_gives_wider_interval():
    bootstrap = DocumentBootstrap.draw(np.arange(40), 500, seed=0)
    values = np.random.default_rng(1).normal(size=40)
    narrow, wide = (mean_interval(bootstrap, values, level) for level in (0.5, 0.99))
    assert wide.lo < narrow.lo < narrow.hi < wide.hi


# --- others' tables -----------------------------------------------------------------------------


def test_published_cross_entropy_recovered():
    """From the cross-entropies of a published table to its own column; zero ablation is the
    reference."""
    with (TABLES / "saebench_core_gemma-2-2b_4k.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    column = lambda name: np.array([float(row[name]) for row in rows])
    found = metrics.cross_entropy_recovered(
        column("ce_loss_with_ablation"), column("ce_loss_with_sae"), column("ce_loss_without_sae")
    )
    assert len(rows) == 13
    np.testing.assert_allclose(found, column("loss_recovered"), rtol=0, atol=1e-6)
