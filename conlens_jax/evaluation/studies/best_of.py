"""Best of K: what sampling more texts is worth.

K texts are sampled for each row, and the one whose reconstruction is nearest to the activation is
kept. The choice uses the activation, which a user may have too; it does not use M.
"""

from __future__ import annotations

from conlens_jax.evaluation.suite import Evaluated, Suite
from conlens_jax.measurement.aggregates import doublings, reconstruction_statistics
from conlens_jax.measurement.bootstrap import Interval, Statistic
from conlens_jax.measurement.metrics import cosine
from conlens_jax.models.param_table import Params

SHORT = ("fve_nrm", "kl_frac_mean")


def best_of(
    suite: Suite, evaluated: Evaluated, trainable: Params, frozen: Params, most: int
) -> dict[str, Interval]:
    """``best_of_K_…`` for K = 1, 2, 4, … ``most``; every larger K includes the draws of the
    smaller ones, and the first draw is the sampled text of the basic suite."""
    actual = suite.rows.activations_ND
    best_ND = evaluated.explained.reconstructions["sampled"].copy()
    best_cos_N = cosine(best_ND, actual)
    vectors, sizes = {}, doublings(most)
    for draw in range(most):
        if draw:
            _, drawn_ND = suite.measurer.sample(trainable, frozen, suite.rows, draw)
            cos_N = cosine(drawn_ND, actual)
            better = cos_N > best_cos_N
            best_ND[better], best_cos_N[better] = drawn_ND[better], cos_N[better]
        if draw + 1 in sizes:
            vectors[f"best_of_{draw + 1}"] = best_ND.copy()
    per_row = suite.score(evaluated, frozen["original"], vectors)
    statistics: dict[str, Statistic] = {}
    resultant = suite.reference.resultant
    for name in vectors:
        statistics |= reconstruction_statistics(name, f"{name}_", resultant, SHORT)
    return suite.intervals(statistics, per_row)


def best_of_curves(metrics: dict[str, Interval]) -> dict[str, tuple[list[int], list[float]]]:
    """(K, value) of each metric, for a chart; empty where best of K was not measured."""
    curves = {}
    for metric in SHORT:
        names = [n for n in metrics if n.startswith("best_of_") and n.endswith(f"_{metric}")]
        of_size = {int(n.removeprefix("best_of_").split("_")[0]): metrics[n].value for n in names}
        if of_size:
            curves[metric] = (sorted(of_size), [of_size[size] for size in sorted(of_size)])
    return curves
