"""The evaluation report: one HTML file that needs nothing else.

No script, no network, no external font or picture: the charts are inline SVG and the style sheet is
in the page. The templates are in ``templates/``; everything that comes from a model, a corpus or a
config is escaped there, and the same report gives the same bytes.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from conlens_jax.evaluation.report.heat_map import STEPS
from conlens_jax.evaluation.report.markup import (
    as_markup,
    format_interval,
    format_number,
    template_environment,
)
from conlens_jax.evaluation.report.report_data import (
    HIGHER,
    Example,
    MetricRow,
    Report,
    report_problems,
)
from conlens_jax.evaluation.report.svg import (
    N_COLOURS,
    CurveChart,
    HistogramChart,
    ReliabilityChart,
    curve_svg,
    finite_values,
    histogram_svg,
    interval_strip,
    last_value,
    reliability_svg,
    series_colours,
)
from conlens_jax.files.paths import local_path
from conlens_jax.files.whole import write_whole

_OPEN_EXAMPLES = 6
_RELIABILITY = (
    "Each dot is a tenth of the claims that the calibration was not fitted on (claims of equal "
    "support are in one dot; its area is their number). On the dashed line as many are right as "
    "their support says; above it, more."
)


def render_report(report: Report) -> str:
    """The report as one self-contained HTML page.

    Raises:
      ValueError: rows or series whose lengths do not fit; all of them in one message.
    """
    problems = list(report_problems(report))
    if problems:
        raise ValueError("\n".join(f"  - {problem}" for problem in problems))
    colours = [index % N_COLOURS for index in range(len(report.columns))]
    colour_of = dict(zip(report.columns, colours, strict=True))
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            colours=colours,
            colour_of=colour_of,
            sections=[section for section in _sections(report, colour_of) if section.content],
        )
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Replaces the page as a whole: a reader never sees half of it. Makes the folder if needed.

    Raises:
      ValueError: see :func:`render_report`; nothing is written then.
    """
    path = local_path(path)
    page = render_report(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


class _Section(NamedTuple):
    """``content`` is what the template shows; a section without it is left out."""

    id: str
    title: str
    template: str
    content: Any
    note: str = ""


def _sections(report: Report, colour_of: Mapping[str, int]) -> list[_Section]:
    charts = "charts.html.jinja"
    last = "The number beside a name is the last value of its curve."
    colour = colour_of.get(report.reliability_of, 0)
    reliability = [_reliability_figure(chart, colour) for chart in report.reliability]
    measured = [_curve_figure(chart, colour_of) for chart in report.measured_curves]
    training = [_curve_figure(chart, colour_of) for chart in report.curves]
    histograms = [_histogram_figure(chart, colour_of) for chart in report.histograms]
    return [
        _Section("metrics", "Metrics", "metrics.html.jinja", report.metric_groups),
        _Section("support", "Support and truth", charts, reliability, _RELIABILITY),
        _Section("scaling", "More text, more tries", charts, measured, last),
        _Section("heat", "Token by token", "heat_maps.html.jinja", report.heat_maps),
        _Section("examples", "Examples", "examples.html.jinja", report.examples),
        _Section("curves", "Training", charts, training, last),
        _Section(
            "rows", "Row by row", charts, histograms, "The number beside a name is its median."
        ),
        _Section("notes", "Notes and limits", "notes.html.jinja", report.notes),
        _Section("config", "Configuration", "config.html.jinja", _settings(report.config)),
    ]


@functools.cache
def _environment() -> jinja2.Environment:
    environment = template_environment("conlens_jax.evaluation.report")
    environment.filters |= {
        "bar": _bar_width,
        "best": _best,
        "interval": format_interval,
        "largest_probability": _largest_probability,
        "percent": _percent,
        "split_space": _split_space,
        "strip": as_markup(interval_strip),
    }
    environment.globals |= {
        "heat_starts": ["0", *(f"{step:g}" for step in STEPS)],
        "n_open": _OPEN_EXAMPLES,
    }
    return environment


def _best(row: MetricRow) -> int | None:
    """Index of the best value; None where there is no choice to make."""
    finite = [(v.value, i) for i, v in enumerate(row.values) if v and math.isfinite(v.value)]
    if len(finite) < 2 or not row.better:
        return None
    value, index = (max if row.better == HIGHER else min)(finite, key=lambda pair: pair[0])
    return index if [v for v, _ in finite].count(value) == 1 else None


# --- charts -------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A series in a legend."""

    colour: int
    name: str
    value: str


class _Figure(NamedTuple):
    title: str
    note: str
    svg: Markup
    legend: Sequence[_Entry]


def _curve_figure(chart: CurveChart, colour_of: Mapping[str, int]) -> _Figure:
    colours = series_colours([series.name for series in chart.series], colour_of)
    legend = [
        _Entry(colour, series.name, format_number(last_value(series)))
        for colour, series in zip(colours, chart.series, strict=True)
    ]
    return _Figure(chart.title, chart.note, Markup(curve_svg(chart, colours)), legend)


def _reliability_figure(chart: ReliabilityChart, colour: int) -> _Figure:
    legend = [
        _Entry(colour, "claims", f"{chart.claims:,}"),
        _Entry(colour, "calibration error", format_number(chart.calibration_error)),
    ]
    return _Figure(chart.title, "", Markup(reliability_svg(chart, colour)), legend)


def _histogram_figure(chart: HistogramChart, colour_of: Mapping[str, int]) -> _Figure:
    colours = series_colours([name for name, _ in chart.series], colour_of)
    legend = []
    for colour, (name, values) in zip(colours, chart.series, strict=True):
        finite = finite_values(values)
        median = format_number(float(np.median(finite)) if finite.size else math.nan)
        left_out = len(values) - finite.size
        legend.append(_Entry(colour, name, median + (f", {left_out} not finite" * bool(left_out))))
    return _Figure(chart.title, chart.note, Markup(histogram_svg(chart, colours)), legend)


# --- examples -----------------------------------------------------------------------------------


def _largest_probability(example: Example) -> float:
    """One scale for both lists, so that bars can be compared across the swap."""
    both = (p for _, p in (*example.top_before, *example.top_after))
    return max((p for p in both if math.isfinite(p) and p > 0), default=1.0)


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %" if math.isfinite(probability) else "n/a"


def _bar_width(probability: float, scale: float) -> str:
    share = min(max(probability, 0.0) / scale, 1.0) if math.isfinite(probability) else 0.0
    return f"{100 * share:.1f}%"


def _split_space(token: str) -> tuple[str, str]:
    """The spaces before a word, which would look like a mistake if highlighted, and the word."""
    word = token.lstrip(" ") if token.strip() else token
    return token[: len(token) - len(word)], word


# --- config -------------------------------------------------------------------------------------


def _settings(config: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Section → (name, value) of its settings; those outside any section under "general"."""
    plain = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
    sections = {"general": plain} if plain else {}
    sections |= {name: value for name, value in config.items() if isinstance(value, Mapping)}
    return {
        title: [(name, _shown_setting(value)) for name, value in _flatten(values)]
        for title, values in sections.items()
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown_setting(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
