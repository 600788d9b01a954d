"""Which number of claims is in which cell of the report; what was not measured is left out."""

from __future__ import annotations

from conlens_jax.evaluation.report.claim_tables import claim_groups, reliability_charts
from conlens_jax.measurement.bootstrap import Interval

MEASURED = (
    *("support_ece", "support_right_at_90", "support_share_at_50", "support_ece_context"),
    *("context_words_right_distance_0_8", "null_shuffle_context_words_right_distance_33_up"),
    *("context_words_found_distance_9_16", "support_ece_with_16_samples"),
    *("support_ece_only_4_samples", "support_right_at_70_only_4_samples"),
)
METRICS = {name: Interval(float(place)) for place, name in enumerate(MEASURED)}


def test_every_metric_is_where_its_row_and_column_say():
    shown = {
        group.title: {
            (row.name, column): MEASURED[int(interval.value)]
            for row in group.rows
            for column, interval in zip(group.columns, row.values, strict=True)
            if interval is not None
        }
        for group in claim_groups(METRICS)
    }
    assert shown == {
        "Support by kind of claim": {
            ("all claims", "calibration error"): "support_ece",
            ("all claims", "support ≥ 0.9: right"): "support_right_at_90",
            ("all claims", "support ≥ 0.5: share"): "support_share_at_50",
            ("words of the context", "calibration error"): "support_ece_context",
            ("all claims, with 16 samples", "calibration error"): "support_ece_with_16_samples",
            ("claims of 4 samples only", "calibration error"): "support_ece_only_4_samples",
            ("claims of 4 samples only", "support ≥ 0.7: right"): (
                "support_right_at_70_only_4_samples"
            ),
        },
        "Words of the context by distance": {
            ("0 to 8 ago", "said and there"): "context_words_right_distance_0_8",
            ("9 to 16 ago", "of the target's, said"): "context_words_found_distance_9_16",
            ("33 or more ago", "another row's text"): (
                "null_shuffle_context_words_right_distance_33_up"
            ),
        },
    }


def test_one_diagram_for_each_kind():
    bins = [
        {"claims": 30, "support": 0.2, "right": 0.1},
        {"claims": 10, "support": 0.9, "right": 1.0},
    ]
    every, nexts = reliability_charts({"next": bins[:1], "all": bins})
    assert (every.title, nexts.title) == ("All claims", "Next words")
    assert every.bins == [(0.2, 0.1, 30), (0.9, 1.0, 10)] and nexts.bins == every.bins[:1]
    assert reliability_charts({}) == []
