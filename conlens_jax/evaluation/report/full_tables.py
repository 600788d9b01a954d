"""The full suite on the page: tables and charts, as data. What was not measured is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from conlens_jax.evaluation.report.report_data import (
    HIGHER,
    NEITHER,
    TABLES,
    Intervals,
    MetricGroup,
    MetricRow,
)
from conlens_jax.evaluation.report.svg import CurveChart, Series
from conlens_jax.evaluation.report.truth_tables import truth_by
from conlens_jax.evaluation.studies.best_of import best_of_curves
from conlens_jax.evaluation.studies.text_changes import CHANGES

_COMPARED_BY = ("fve_nrm", "kl_frac_mean", "top1_agree")


def comparison(metrics: Intervals) -> MetricGroup:
    """Everything that explains the same activations, in one table."""
    rows = []
    for prefix, name, explanation in TABLES["side_by_side"]["rows"]:
        values = [metrics.get(prefix + metric) for metric in _COMPARED_BY]
        if any(values):
            rows.append(MetricRow(name, explanation, NEITHER, values))
    bits = metrics.get("linear_code_bits")
    counted = f" T tokens carry at most {bits.value:.0f} bits." if bits else ""
    return MetricGroup(
        "Side by side",
        "The same rows, resamples and references for all. 1 is perfect, 0 no better than the mean "
        "activation." + counted,
        rows,
        _COMPARED_BY,
    )


def damage(systems: Mapping[str, Intervals]) -> MetricGroup:
    """What is left of each lens's text after each change, for both readers.

    Args:
      systems: name of a lens → its metrics.
    """
    columns = {
        "rows touched": "{}_rows",
        "fve_nrm left": "{}_retention",
        "kl_frac_mean left": "{}_kl_retention",
        "fve_nrm left, audit encoder": "frozen_{}_retention",
        "kl_frac_mean left, audit encoder": "frozen_{}_kl_retention",
    }
    rows = []
    for change, (_, explanation) in CHANGES.items():
        for system, metrics in systems.items():
            values = [metrics.get(name.format(change)) for name in columns.values()]
            if any(values):
                rows.append(MetricRow(f"{change}, {system}", explanation, NEITHER, values))
    return MetricGroup(
        "Damage: what a changed text still explains",
        "Shares of what the whole text explains, on the rows that the change touches; negative "
        "where the changed text misleads.",
        rows,
        list(columns),
    )


def interventions(metrics: Intervals, variables: Sequence[str]) -> MetricGroup:
    """The edit and its two controls, all rows together and by variable."""
    columns = ("edit to w", "control: to a third value", "control: random word")
    prefixes = ("", "third_value_", "random_word_")
    groups = [
        ("intervention_", "every value"),
        ("intervention_next_", "where it is M's next token"),
    ]
    groups += [(f"intervention_{name}_", name) for name in variables]
    groups += [
        ("next_word_intervention_", "the first next word"),
        ("next_word_intervention_next_", "the first next word, where it is M's next token"),
    ]
    rows = []
    for key, name in groups:
        for what, explanation in (
            ("success", "M preferred v before and prefers w after"),
            ("shift", "change of log p(w) − log p(v), nats"),
        ):
            values = [metrics.get(f"{prefix}{key}{what}") for prefix in prefixes]
            if any(values):
                rows.append(MetricRow(f"{what}: {name}", explanation, HIGHER, values))
    return MetricGroup(
        "Interventions",
        "A value v that the explanation states becomes w, the text is read again and swapped in.",
        rows,
        columns,
    )


def parts(metrics: Intervals) -> MetricGroup:
    """Greedy text by position in the context and by the norm of the activation."""
    columns = ("rows", "fve_nrm", "kl_frac_mean")
    names = [
        f"{what}_{part}" for what in ("position", "norm") for part in ("low", "middle", "high")
    ]
    rows = []
    for name in (*names, "norm_ordinary", "norm_outlier"):
        values = [metrics.get(f"{name}_{column}") for column in columns]
        if any(values):
            rows.append(MetricRow(name.replace("_", ", "), "", NEITHER, values))
    note = "Thirds of the rows; an outlier's norm is more than three times the median."
    return MetricGroup("By position and by norm", note, rows, columns)


def full_groups(
    main: str, systems: Mapping[str, Intervals], variables: Sequence[str]
) -> list[MetricGroup]:
    """Tables with columns of their own; empty ones are left out.

    Args:
      main: name of the lens of all tables but the damage table.
      variables: what is known of every document.
    """
    metrics = systems[main]
    # For the basic suite the comparison would only repeat its tables.
    groups = [comparison(metrics)] if "gap_frozen" in metrics else []
    groups += [damage(systems), *truth_by(metrics, variables)]
    groups += [interventions(metrics, variables), parts(metrics)]
    return [group for group in groups if group.rows]


def full_charts(metrics: Intervals) -> list[CurveChart]:
    """Best of K, and FVE by the number of tokens that are read."""
    charts = []
    by_size = best_of_curves(metrics)
    if by_size:
        charts.append(
            CurveChart(
                "Best of K",
                "texts sampled per row",
                "share explained",
                [Series(name, *curve) for name, curve in by_size.items()],
                "The text with the nearest reconstruction is kept: the choice uses a.",
            )
        )
    series = []
    for reader, label in (("", "own encoder"), ("frozen_", "audit encoder")):
        marker = f"{reader}fve_nrm_at_"
        points = sorted(
            (int(name.removeprefix(marker)), interval.value)
            for name, interval in metrics.items()
            if name.startswith(marker)
        )
        if points:
            series.append(Series(label, *zip(*points, strict=True)))
    if len(series) > 1:
        charts.append(
            CurveChart("Truncation", "first tokens read", "fve_nrm", series, "Greedy text.")
        )
    return charts
