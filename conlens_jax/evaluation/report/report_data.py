"""What an evaluation report shows, as data; ``writing.py`` makes the page of it."""

from __future__ import annotations

import dataclasses
import importlib.resources
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conlens_jax.evaluation.report.heat_map import HeatMap
from conlens_jax.evaluation.report.svg import CurveChart, HistogramChart, ReliabilityChart
from conlens_jax.evaluation.words import Word
from conlens_jax.measurement.bootstrap import Interval

HIGHER, LOWER, NEITHER = "higher", "lower", ""
"""The direction in which a metric is better."""
TABLES = tomllib.loads(
    importlib.resources.files(__package__).joinpath("tables.toml").read_text("utf-8")
)
"""The content of ``tables.toml``: which metrics the tables have, and what they are."""
Intervals = Mapping[str, Interval]


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """One metric of every system. ``better`` is ``HIGHER``, ``LOWER`` or ``NEITHER``;
    ``values`` has one entry per column, None where the metric does not apply."""

    name: str
    explanation: str
    better: str
    values: Sequence[Interval | None]


@dataclasses.dataclass(frozen=True)
class MetricGroup:
    """One table; ``columns`` are its own where they are not the systems of the report."""

    title: str
    note: str
    rows: Sequence[MetricRow]
    columns: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Example:
    """One row, for reading.

    Attributes:
      context: the text before the position; token_at_position: the token whose activation is read;
        continuation: the text that follows, which the lens does not see.
      explanations: (column name, text written from the activation); a text that carries its
        tokens (:class:`~conlens_jax.models.written.Written`) is shown with them.
      other_row_text: the control, the text of another row.
      numbers: metrics of this row by name, for example KL and cosine.
      top_before, top_after: (token, probability) of M's next-token predictions without and with
        the swap.
      label: why this row is shown, where it was not chosen in advance.
      words: column name → the words of its text with their support.
      warnings: column name → why its text should not be believed.
    """

    context: str
    token_at_position: str
    continuation: str
    explanations: Sequence[tuple[str, str]]
    other_row_text: str = ""
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    top_before: Sequence[tuple[str, float]] = ()
    top_after: Sequence[tuple[str, float]] = ()
    label: str = ""
    words: Mapping[str, Sequence[Word]] = dataclasses.field(default_factory=dict)
    warnings: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that the page shows; empty parts are left out.

    Attributes:
      summary: one or two plain sentences with the result.
      facts: (label, value) pairs: model, layer, rows, seed.
      columns: the systems, side by side in every table.
      config: nested plain values.
      notes: limits and remarks, one paragraph each.
      curves, measured_curves: of the training, and of the evaluation.
      reliability: of the claims of one of the columns, ``reliability_of``.
    """

    title: str
    summary: str
    facts: Sequence[tuple[str, Any]]
    columns: Sequence[str]
    metric_groups: Sequence[MetricGroup]
    curves: Sequence[CurveChart] = ()
    histograms: Sequence[HistogramChart] = ()
    examples: Sequence[Example] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    measured_curves: Sequence[CurveChart] = ()
    heat_maps: Sequence[HeatMap] = ()
    reliability: Sequence[ReliabilityChart] = ()
    reliability_of: str = ""


def report_problems(report: Report) -> Iterator[str]:
    """Why a report cannot be rendered; empty if it can."""
    for group in report.metric_groups:
        for row in group.rows:
            columns = group.columns or report.columns
            if len(row.values) != len(columns):
                yield (
                    f"metric {row.name!r} has {len(row.values)} values for "
                    f"{len(columns)} columns; give None where there is no value"
                )
            if row.better not in (HIGHER, LOWER, NEITHER):
                yield f"metric {row.name!r}: better must be 'higher', 'lower' or ''"
    for chart in (*report.curves, *report.measured_curves):
        for series in chart.series:
            if len(series.x) != len(series.y):
                yield (
                    f"chart {chart.title!r}, series {series.name!r}: x has {len(series.x)} "
                    f"entries and y has {len(series.y)}"
                )
