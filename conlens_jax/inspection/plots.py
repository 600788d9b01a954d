"""Pictures through matplotlib: KL and support by position, and the reliability of the support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from conlens_jax.evaluation.support import Calibration
from conlens_jax.inspection.readings import ExplainedToken

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette, as on the pages: told apart without colour vision.
_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"
_COLOURS = (_BLUE, _ORANGE, _GREEN, "#cc79a7")
_INCHES_PER_TOKEN, _WIDTHS = 0.22, (6.0, 40.0)


def plot(rows: Sequence[ExplainedToken], calibration: Calibration | None = None) -> Figure:
    """Three pictures, of which those without data are left out.

    * KL of the explanation that changes M least, at each token; a dash where the mean training
      activation is in its place.
    * Support of each word of the greedy text (the decoder's own probability, without a
      calibration).
    * The reliability of the support on the held-out claims that it was not fitted on.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there are no rows.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'conlens_jax[notebook]'") from error
    if not rows:
        raise ValueError("there are no explained tokens to plot")
    reliability = {} if calibration is None else calibration.measured.get("reliability", {})
    draws = [lambda axes: _draw_kl(axes, rows)]
    if any(reading.words for row in rows for reading in row.readings):
        draws.append(lambda axes: _draw_words(axes, rows))
    width = float(np.clip(_INCHES_PER_TOKEN * len(rows) + 1, *_WIDTHS))
    heights = [2.6] * len(draws) + ([4.2] if reliability else [])
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for place, draw in enumerate(draws):
        draw(figure.add_subplot(grid[place]))
    if reliability:
        _draw_reliability(figure.add_subplot(grid[len(draws)]), reliability)
    return figure


def _draw_kl(axes: Axes, rows: Sequence[ExplainedToken]) -> None:
    places = np.arange(len(rows))
    axes.bar(places, [row.best.kl for row in rows], color=_BLUE, label="explanation")
    means = [np.nan if row.kl_mean is None else row.kl_mean for row in rows]
    if np.isfinite(means).any():
        axes.scatter(places, means, marker="_", color=_ORANGE, label="mean activation")
    axes.set_ylabel("KL, nats")
    axes.legend(frameon=False, fontsize="small")
    _name_tokens(axes, rows)


def _draw_words(axes: Axes, rows: Sequence[ExplainedToken]) -> None:
    known = [reading for row in rows for reading in row.readings if reading.words]
    calibrated = known[0].support is not None
    points = [
        (place, value)
        for place, row in enumerate(rows)
        for reading in row.readings
        for word in reading.words or ()
        if (value := word.value(calibrated)) is not None
    ]
    axes.scatter(*np.reshape(points, (-1, 2)).T, s=18, alpha=0.6, color=_GREEN)
    axes.set_ylabel("support" if calibrated else "probability")
    axes.set_ylim(-0.03, 1.03)
    _name_tokens(axes, rows)


def _name_tokens(axes: Axes, rows: Sequence[ExplainedToken]) -> None:
    # As plain text: a token may contain a dollar sign, which would begin a formula.
    names = [(row.token.strip() or repr(row.token)).replace("$", r"\$") for row in rows]
    axes.set_xticks(np.arange(len(rows)), names, rotation=90, fontsize="x-small")
    axes.set_xlim(-0.7, len(rows) - 0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_reliability(axes: Axes, reliability: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    kinds = [kind for kind in reliability if kind != "all"] or list(reliability)
    for kind, colour in zip(kinds, _COLOURS, strict=False):
        bins = reliability[kind]
        values = lambda name, bins=bins: [entry[name] for entry in bins]
        axes.plot(values("support"), values("right"), marker="o", color=colour, label=kind)
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle="--")
    axes.set(xlabel="support", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize="small")
