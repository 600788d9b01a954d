"""The truth study on the page: tables by variable, by distance and by layer, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from conlens_jax.evaluation.report.report_data import (
    NEITHER,
    Intervals,
    MetricGroup,
    MetricRow,
)
from conlens_jax.evaluation.studies.truth import RANGES, SOON

# The true window stays in metrics.json: more columns than these do not fit a page.
_TEXTS = {"greedy text": "", "another row's text": "null_shuffle_", "M's own words": "text_only_"}
_RECALL = {f"recall, {name}": f"{prefix}recall{{}}" for name, prefix in _TEXTS.items()}
_PRECISION = {f"precision, {name}": f"{prefix}precision{{}}" for name, prefix in _TEXTS.items()}
_READ = {"probe": "probe_read{}", "most frequent value": "prior_read{}"}


def truth_by(metrics: Intervals, variables: Sequence[str]) -> list[MetricGroup]:
    """Texts by variable, by distance from where the context states it, and by layer."""
    views = {
        "by variable": (
            "Where several variables look alike in a text, a value is right if it is that of any.",
            {name: f"_{name}" for name in variables},
        ),
        f"by variable, 1 to {SOON} tokens before it is stated": (
            "Only where the context decides the value and has not stated it.",
            {name: f"_{name}_soon" for name in variables},
        ),
        "by distance": (
            "Tokens since the context last stated the value, or until it first does, where it is "
            "decided before.",
            {in_words(name): f"_{name}" for name in RANGES},
        ),
    }
    stated = "Probe and most frequent value: of all that is decided; recall: of what is read."
    right = "Of the values that the text states, those that are right."
    groups = []
    for view, (note, rows) in views.items():
        for what, of_what, columns in (
            ("what is stated", stated, {**_READ, **_RECALL}),
            ("what is right", right, _PRECISION),
        ):
            groups.append(
                _table(f"Truth {view}: {what}", f"{of_what} {note}", rows, columns, metrics)
            )
    return groups + _by_layer(metrics, variables)


def _by_layer(metrics: Intervals, variables: Sequence[str]) -> list[MetricGroup]:
    key = "recall_layer_"
    layers = [name.removeprefix(key) for name in metrics if name.startswith(key)]
    if not layers:
        return []
    probes = {"the lens's layer": "probe_read{}"}
    probes |= {f"layer {layer}": f"probe_read_layer_{layer}{{}}" for layer in layers}
    where = {}
    for layer in layers:
        where[f"read at layer {layer}"] = f"_layer_{layer}"
        where[f"read at the lens's layer but not at layer {layer}"] = f"_beyond_layer_{layer}"
    return [
        _table(
            "Control: another layer",
            "What a probe reads from M's activation after other blocks, same rows and positions.",
            {"all": "", **{name: f"_{name}" for name in variables}},
            probes,
            metrics,
        ),
        _table(
            "Control: what can be read at another layer",
            "Recall of what is read there.",
            where,
            _RECALL,
            metrics,
        ),
    ]


def in_words(name: str) -> str:
    """``distance_4_7`` → "4 to 7 ago", ``ahead_16_up`` → "in 16 or more"."""
    kind, low, high = name.split("_")
    tokens = f"{low} or more" if high == "up" else f"{low} to {high}"
    return f"{tokens} ago" if kind == "distance" else f"in {tokens}"


def _table(
    title: str, note: str, rows: Mapping[str, str], columns: Mapping[str, str], metrics: Intervals
) -> MetricGroup:
    """Cells by name of a metric: a column's with the row's part in its braces. Empty rows and
    columns are left out."""
    cells = {
        row: [metrics.get(column.format(part)) for column in columns.values()]
        for row, part in rows.items()
    }
    shown = [i for i in range(len(columns)) if any(values[i] for values in cells.values())]
    return MetricGroup(
        title,
        note,
        [
            MetricRow(row, "", NEITHER, [values[i] for i in shown])
            for row, values in cells.items()
            if any(values)
        ],
        [list(columns)[i] for i in shown],
    )
