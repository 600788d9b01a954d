"""Pictures: what is drawn is what was measured."""

from __future__ import annotations

import io

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from conlens_jax.evaluation.support import Calibration
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.plots import plot
from conlens_jax.inspection.readings import ExplainedToken, Prediction, Reading

RELIABILITY = {
    "all": [{"claims": 9, "support": 0.4, "right": 0.5}],
    "next": [
        {"claims": 5, "support": 0.3, "right": 0.2},
        {"claims": 4, "support": 0.9, "right": 1.0},
    ],
    "context": [{"claims": 4, "support": 0.6, "right": 0.5}],
}
CALIBRATION = Calibration({}, {}, {"reliability": RELIABILITY})


def row(
    token: str, kl: float, support: tuple[float | None, ...] | None, kl_mean: float | None
) -> ExplainedToken:
    after = (Prediction("a", 0.5),)
    pieces, probabilities = ("fox", " |"), (0.25, 0.9)
    reading = Reading("fox |", 0.9, kl, after, (1, 2), True, pieces, support, (), probabilities)
    return ExplainedToken(0, 3, token, after, (reading,), kl_mean)


ROWS = (row(" a", 0.5, (0.95, None), 3.0), row("$x$", 1.5, (0.25, None), None))


def test_kl_support_and_reliability_are_drawn():
    figure = plot(ROWS, CALIBRATION)
    kl, support, reliability = figure.axes
    assert [bar.get_height() for bar in kl.patches] == [0.5, 1.5]
    (means,) = kl.collections
    np.testing.assert_array_equal(means.get_offsets()[:, 1].filled(np.nan), [3.0, np.nan])
    assert kl.get_xticklabels()[0].get_text() == "a"
    np.testing.assert_array_equal(support.collections[0].get_offsets(), [[0, 0.95], [1, 0.25]])
    assert support.get_ylabel() == "support"
    lines = {line.get_label(): line.get_xydata().tolist() for line in reliability.lines}
    assert lines["next"] == [[0.3, 0.2], [0.9, 1.0]] and lines["context"] == [[0.6, 0.5]]
    assert "all" not in lines
    figure.savefig(io.BytesIO())  # "$x$" is no formula


def test_without_a_calibration_the_probability_is_drawn():
    kl, words = plot([row("a", 0.5, None, None)]).axes
    assert not kl.collections and words.get_ylabel() == "probability"
    np.testing.assert_array_equal(words.collections[0].get_offsets(), [[0, 0.25]])


def test_only_what_there_is():
    sampled = Reading.of("fox", 0.9, 0.5, ())
    explained = Explanations((ExplainedToken(0, 1, "a", (), (sampled,)),), (("b", "a"),))
    assert len(explained.plot().axes) == 1
    with pytest.raises(ValueError, match="no explained tokens"):
        Explanations((), ()).plot()
