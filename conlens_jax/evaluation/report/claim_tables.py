"""Claims on the page: their support by kind, words of the context by distance, and the reliability
diagrams, as data. What was not measured is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from conlens_jax.evaluation.claims import CONTEXT, FACT, NEXT, RECENT
from conlens_jax.evaluation.report.report_data import NEITHER, Intervals, MetricGroup, MetricRow
from conlens_jax.evaluation.report.svg import ReliabilityChart
from conlens_jax.evaluation.report.truth_tables import in_words
from conlens_jax.evaluation.studies.agreement import ONLY, WITH
from conlens_jax.evaluation.studies.said_words import DISTANCES

KINDS = {
    "all": "all claims",
    NEXT: "next words",
    CONTEXT: "words of the context",
    RECENT: "last tokens",
    FACT: "facts",
    f"{WITH}_samples": "all claims, with the agreement of samples",
    f"{ONLY}_samples": "claims of samples only",
}


def claim_groups(metrics: Intervals) -> list[MetricGroup]:
    """The tables of one lens; empty ones too."""
    return [_by_kind(metrics), _by_distance(metrics)]


def _by_kind(metrics: Intervals) -> MetricGroup:
    columns = {"calibration error": "support_ece{}"}
    for level in (90, 70, 50):
        columns[f"support ≥ {level / 100}: right"] = f"support_right_at_{level}{{}}"
        columns[f"support ≥ {level / 100}: share"] = f"support_share_at_{level}{{}}"
    suffixes = {name: "" if kind == "all" else f"_{kind}" for kind, name in KINDS.items()}
    for what, name in ((WITH, "all claims, with {} samples"), (ONLY, "claims of {} samples only")):
        marker, end = f"support_ece_{what}_", "_samples"
        found = (re.fullmatch(f"{marker}(\\d+){end}", metric) for metric in metrics)
        for k in sorted(int(match[1]) for match in found if match):
            suffixes[name.format(k)] = f"_{what}_{k}{end}"
    rows = []
    for name, suffix in suffixes.items():
        values = [metrics.get(column.format(suffix)) for column in columns.values()]
        if any(values):
            rows.append(MetricRow(name, "", NEITHER, values))
    note = (
        "On claims that the calibration was not fitted on. Share: of all claims of the row's kind. "
        "Claims of samples only: those that at least a quarter of them state, and the greedy text "
        "does not."
    )
    return MetricGroup("Support by kind of claim", note, rows, list(columns))


def _by_distance(metrics: Intervals) -> MetricGroup:
    columns = {
        "said and there": "context_words_right_{}",
        "another row's text": "null_shuffle_context_words_right_{}",
        "of the target's, said": "context_words_found_{}",
    }
    rows = []
    for name in DISTANCES:
        values = [metrics.get(column.format(name)) for column in columns.values()]
        if any(values):
            rows.append(MetricRow(in_words(name), "", NEITHER, values))
    return MetricGroup(
        "Words of the context by distance",
        "Tokens from the word, where it is nearest, to P. First two columns: of all words that a "
        "text says the context has, the share that it has there; what is missing to 1 is nowhere "
        "in the context. A distance where both columns are equal is chance.",
        rows,
        list(columns),
    )


def reliability_charts(
    tables: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[ReliabilityChart]:
    """One diagram per kind of claim.

    Args:
      tables: ``measured["reliability"]`` of
        :class:`~conlens_jax.evaluation.support.Calibration`: kind, or "all", → bins.
    """
    return [
        ReliabilityChart(
            KINDS[kind][0].upper() + KINDS[kind][1:],
            [(b["support"], b["right"], int(b["claims"])) for b in tables[kind]],
        )
        for kind in KINDS
        if kind in tables
    ]
