"""Metrics on disk: ``metrics.json`` for programs, ``metrics.csv`` for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

from conlens_jax.files.whole import write_whole
from conlens_jax.measurement.bootstrap import Interval

Flat = dict[str, Interval]
MEASURED_STEP = "checkpoint_step"


def flatten(
    measured: Mapping[str, Mapping[str, Interval]],
    main: str,
    differences: Mapping[str, Mapping[str, Interval]],
    statistics: Mapping[str, float],
) -> Flat:
    """One level of names. The main lens has no prefix; the others have ``warm_`` or ``control_``,
    and differences end in ``_minus_warm`` or ``_minus_control``.

    Args:
      statistics: of the language model, without an interval.
    """
    flat: Flat = {}
    for key, metrics in measured.items():
        prefix = "" if key == main else f"{key}_"
        flat |= {prefix + name: interval for name, interval in metrics.items()}
    for key, metrics in differences.items():
        flat |= {f"{name}_minus_{key}": interval for name, interval in metrics.items()}
    return flat | {name: Interval(value) for name, value in statistics.items()}


def write_metrics(
    folder: Path, flat: Flat, without_interval: Mapping[str, float], step: int
) -> None:
    """``metrics.json`` (``name``, ``name_lo``, ``name_hi``; null where there is no number; and
    ``checkpoint_step``, the step of the measured checkpoint) and ``metrics.csv`` (one row per
    metric). A metric that never has an interval is one number in both."""
    values: dict[str, float | None] = {MEASURED_STEP: float(step)}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["metric", "value", "lo", "hi"])
    for name, interval in flat.items():
        numbers = _with_ends(name, interval)
        values |= {name: numbers[name]} if name in without_interval else numbers
        cells = ("" if number is None else repr(number) for number in numbers.values())
        writer.writerow([name, *cells])
    write_whole(folder / "metrics.json", json.dumps(values, indent=2) + "\n")
    write_whole(folder / "metrics.csv", table.getvalue())


def with_ends(flat: Flat) -> dict[str, float | None]:
    """The names and numbers of ``metrics.json``: ``name``, ``name_lo``, ``name_hi``."""
    return {k: v for name, interval in flat.items() for k, v in _with_ends(name, interval).items()}


def _with_ends(name: str, interval: Interval) -> dict[str, float | None]:
    ends = {"": interval.value, "_lo": interval.lo, "_hi": interval.hi}
    return {name + end: v if math.isfinite(v) else None for end, v in ends.items()}
