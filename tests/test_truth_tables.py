"""Which metric stands in which cell of the truth tables; what was not measured is left out."""

from __future__ import annotations

from conlens_jax.evaluation.report.truth_tables import truth_by
from conlens_jax.measurement.bootstrap import Interval

MEASURED = (
    *("probe_read", "probe_read_ones", "recall_ones", "null_shuffle_recall_ones", "precision_ones"),
    *("probe_read_ones_soon", "probe_read_carry_soon", "recall_carry_soon"),
    *("probe_read_distance_4_7", "probe_read_ahead_16_up", "text_only_precision_ahead_16_up"),
    *("probe_read_layer_0", "probe_read_layer_0_ones", "recall_layer_0", "recall_beyond_layer_0"),
)
METRICS = {name: Interval(float(place)) for place, name in enumerate(MEASURED)}


def cells(group):
    """(row, column) → name of the metric that is shown there."""
    return {
        (row.name, column): MEASURED[int(interval.value)]
        for row in group.rows
        for column, interval in zip(group.columns, row.values, strict=True)
        if interval is not None
    }


def test_every_metric_stands_where_its_row_and_column_say():
    groups = [group for group in truth_by(METRICS, ("ones", "carry")) if group.rows]
    shown = {group.title: cells(group) for group in groups}
    soon = "Truth by variable, 1 to 7 tokens before it is stated"
    assert shown == {
        "Truth by variable: what is stated": {
            ("ones", "probe"): "probe_read_ones",
            ("ones", "recall, greedy text"): "recall_ones",
            ("ones", "recall, another row's text"): "null_shuffle_recall_ones",
        },
        "Truth by variable: what is right": {("ones", "precision, greedy text"): "precision_ones"},
        f"{soon}: what is stated": {
            ("ones", "probe"): "probe_read_ones_soon",
            ("carry", "probe"): "probe_read_carry_soon",
            ("carry", "recall, greedy text"): "recall_carry_soon",
        },
        "Truth by distance: what is stated": {
            ("4 to 7 ago", "probe"): "probe_read_distance_4_7",
            ("in 16 or more", "probe"): "probe_read_ahead_16_up",
        },
        "Truth by distance: what is right": {
            ("in 16 or more", "precision, M's own words"): "text_only_precision_ahead_16_up"
        },
        "Control: another layer": {
            ("all", "the lens's layer"): "probe_read",
            ("all", "layer 0"): "probe_read_layer_0",
            ("ones", "the lens's layer"): "probe_read_ones",
            ("ones", "layer 0"): "probe_read_layer_0_ones",
        },
        "Control: what can be read at another layer": {
            ("read at layer 0", "recall, greedy text"): "recall_layer_0",
            ("read at the lens's layer but not at layer 0", "recall, greedy text"): (
                "recall_beyond_layer_0"
            ),
        },
    }


def test_a_corpus_without_known_content_has_no_tables():
    assert not any(group.rows for group in truth_by({"fve_nrm": Interval(0.5)}, ()))
