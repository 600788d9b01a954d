"""Charts as inline SVG: curves, step histograms, reliability diagrams, and strips of intervals.

The drawings contain no colours, only the classes ``c0`` … ``c5`` and ``axis``, ``grid``,
``label`` that the page's style sheet colours for light and dark. Text and lines are in the units of
a view box about as wide as a phone, so that a chart is legible there without zooming.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from conlens_jax.evaluation.report.markup import escape, format_number
from conlens_jax.measurement.bootstrap import Interval

N_COLOURS = 6
WIDTH, HEIGHT = 360, 216
_TOP, _BOTTOM, _RIGHT = 24, 36, 10
_CHARACTER = 6.4  # Width of a digit at the label size of 11.5.
_MOST_POINTS = 240
_LARGEST_DOT = 5


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve: x and y of equal length; entries that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclasses.dataclass(frozen=True)
class CurveChart:
    """Curves on common axes; ``markers`` are (x, label) of events, such as the end of a stage."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""
    markers: Sequence[tuple[float, str]] = ()


@dataclasses.dataclass(frozen=True)
class HistogramChart:
    """Distributions of per-row values, (name, values), over common bins."""

    title: str
    x_label: str
    series: Sequence[tuple[str, Sequence[float]]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class ReliabilityChart:
    """Bins of claims: (mean support, share that is right, number of claims)."""

    title: str
    bins: Sequence[tuple[float, float, int]]

    @property
    def claims(self) -> int:
        return sum(n for *_, n in self.bins)

    @property
    def calibration_error(self) -> float:
        """The mean over the claims of the distance of their bin to the diagonal."""
        error = sum(n * abs(support - right) for support, right, n in self.bins)
        return error / self.claims if self.claims else math.nan


def series_colours(names: Sequence[str], reserved: Mapping[str, int]) -> list[int]:
    """A colour index for each series: a system keeps the colour it has in the tables
    (``reserved``), the others take the next one that is free in their chart."""
    taken = {reserved[name] for name in names if name in reserved}
    free = [index for index in range(N_COLOURS) if index not in taken] or list(range(N_COLOURS))
    colours, used = [], 0
    for name in names:
        if name in reserved:
            colours.append(reserved[name])
        else:
            colours.append(free[used % len(free)])
            used += 1
    return colours


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most ``most + 1`` round numbers (steps of 1, 2 or 5) inside ``[low, high]``."""
    if not (math.isfinite(high - low) and high > low):
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks of one axis with equal decimals, in thousands or millions where they are large."""
    largest = max(map(abs, ticks))
    if len(ticks) < 2 or (largest and not 1e-4 <= largest < 1e9):
        return [format_number(tick) for tick in ticks]
    divisor, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1, "")
    step = (ticks[1] - ticks[0]) / divisor
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    # "+ 0.0" turns −0.0 into 0.0.
    shown = [f"{round(tick / divisor, decimals) + 0.0:.{decimals}f}" for tick in ticks]
    return [text.replace("-", "−") + (suffix if float(text) else "") for text in shown]


def _domain(values: np.ndarray, padding: float) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    # Half of the range of a double, so that high − low is finite as well.
    finite = np.clip(finite, -1e300, 1e300)
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low - padding * (high - low), high + padding * (high - low)


@dataclasses.dataclass(frozen=True)
class _Axes:
    x: tuple[float, float]
    y: tuple[float, float]
    left: float

    def px(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - _RIGHT - self.left)

    def py(self, y: float) -> float:
        return (
            HEIGHT - _BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - _BOTTOM - _TOP)
        )


def _axes(
    x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str, percent: bool
) -> tuple[_Axes, list[str]]:
    y_ticks, x_ticks = nice_ticks(*y, most=4), nice_ticks(*x, most=5)
    y_labels = tick_labels([t * 100 for t in y_ticks] if percent else y_ticks)
    axes = _Axes(x, y, left=10 + _CHARACTER * max(map(len, y_labels)))
    base = HEIGHT - _BOTTOM
    parts = [f'<text class="label" x="0" y="11">{escape(y_label)}</text>']
    for tick, label in zip(y_ticks, y_labels, strict=True):
        at = axes.py(tick)
        parts.append(
            f'<line class="grid" x1="{axes.left:.1f}" x2="{WIDTH - _RIGHT}" '
            f'y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" text-anchor="end" x="{axes.left - 6:.1f}" y="{at + 4:.1f}">'
            f"{label}</text>"
        )
    parts.append(
        f'<line class="axis" x1="{axes.left:.1f}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'
    )
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        at = axes.px(tick)
        # The last label must not leave the drawing.
        anchor = "end" if at + _CHARACTER * len(label) / 2 > WIDTH else "middle"
        text_at = min(at, WIDTH) if anchor == "middle" else WIDTH
        parts.append(
            f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{base}" y2="{base + 4}"/>'
            f'<text class="tick" text-anchor="{anchor}" x="{text_at:.1f}" y="{base + 16}">'
            f"{label}</text>"
        )
    parts.append(
        f'<text class="label" text-anchor="end" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}">'
        f"{escape(x_label)}</text>"
    )
    return axes, parts


def _svg(parts: Sequence[str], description: str) -> str:
    text = escape(description)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text}">'
        f"<title>{text}</title>{''.join(parts)}</svg>"
    )


def thin(x: np.ndarray, y: np.ndarray, most: int = _MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Few enough points for the page: the lowest and the highest of each stretch, so that a spike
    in the middle of a long run stays visible."""
    if len(x) <= most:
        return x, y
    keep: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        values = y[stretch]
        if np.isfinite(values).any():
            ends = {int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])}
            keep.extend(sorted(ends))
        else:
            keep.append(int(stretch[0]))
    return x[keep], y[keep]


def _arrays(series: Series) -> tuple[np.ndarray, np.ndarray]:
    if len(series.x) != len(series.y):
        raise ValueError(
            f"series {series.name!r}: x has {len(series.x)} entries and y has {len(series.y)}"
        )
    x, y = np.asarray(series.x, np.float64), np.asarray(series.y, np.float64)
    return x, np.where(np.isfinite(x) & np.isfinite(y), y, np.nan)


def last_value(series: Series) -> float:
    """The last finite y, NaN where there is none."""
    finite = [float(y) for y in series.y if math.isfinite(y)]
    return finite[-1] if finite else math.nan


def _path(axes: _Axes, x: np.ndarray, y: np.ndarray) -> str:
    commands, pen_down = [], False
    for px, py in zip(x, y, strict=True):
        if math.isnan(py):
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{axes.px(px):.1f} {axes.py(py):.1f}")
        if not pen_down:
            commands.append("h0")  # With round caps, a point without neighbours is a dot.
        pen_down = True
    return "".join(commands)


def curve_svg(chart: CurveChart, colours: Sequence[int]) -> str:
    """The chart without its title, legend and note, which are HTML around it.

    Raises:
      ValueError: a series whose x and y differ in length.
    """
    arrays = [_arrays(series) for series in chart.series]
    markers = [(x, label) for x, label in chart.markers if math.isfinite(x)]
    all_x = [x[~np.isnan(y)] for x, y in arrays] + [np.array([x for x, _ in markers])]
    all_y = [y for _, y in arrays] + [np.array([])]
    axes, parts = _axes(
        _domain(np.concatenate(all_x), 0.0),
        _domain(np.concatenate(all_y), 0.06),
        chart.x_label,
        chart.y_label,
        percent=False,
    )
    for x, label in markers:
        at = axes.px(x)
        right_half = at > (axes.left + WIDTH) / 2
        anchor, text_at = ("end", at - 5) if right_half else ("start", at + 5)
        parts.append(
            f'<path class="marker" d="M{at:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>'
            f'<text class="tick halo" text-anchor="{anchor}" x="{text_at:.1f}" y="{_TOP + 9}">'
            f"{escape(label)}</text>"
        )
    for (x, y), colour in zip(arrays, colours, strict=True):
        x, y = thin(x, np.clip(y, -1e300, 1e300))
        x = np.clip(np.nan_to_num(x, posinf=1e300, neginf=-1e300), -1e300, 1e300)
        parts.append(f'<path class="line c{colour}" d="{_path(axes, x, y)}"/>')
    ends = "; ".join(f"{s.name} ends at {format_number(last_value(s))}" for s in chart.series)
    return _svg(parts, f"{chart.title}: {chart.y_label} by {chart.x_label}. {ends}")


def finite_values(values: Sequence[float]) -> np.ndarray:
    """The finite ones of per-row values."""
    array = np.asarray(values, np.float64).reshape(-1)
    return np.clip(array[np.isfinite(array)], -1e300, 1e300)


def _bin_edges(values: np.ndarray) -> np.ndarray:
    low, high = _domain(values, 0.0)
    if 0 < low < 0.1 * high:
        low = 0.0  # A quantity that begins near 0 is read from 0.
    quartiles = np.quantile(values, [0.25, 0.75]) if values.size else np.zeros(2)
    # Freedman and Diaconis (1981), within what a small chart can show.
    width = 2 * (quartiles[1] - quartiles[0]) / max(values.size, 1) ** (1 / 3)
    wanted = (high - low) / width if width > 0 else 24
    return np.linspace(low, high, int(min(max(wanted, 12), 40)) + 1)


def histogram_svg(chart: HistogramChart, colours: Sequence[int]) -> str:
    """Step outlines of the share of rows in each bin; values that are not finite are left out."""
    values = [finite_values(series) for _, series in chart.series]
    edges = _bin_edges(np.concatenate([*values, np.array([])]))
    shares = [np.histogram(v, edges)[0] / max(v.size, 1) for v in values]
    highest = max((float(share.max()) for share in shares), default=0.0) or 1.0
    axes, parts = _axes(
        (float(edges[0]), float(edges[-1])),
        (0.0, highest * 1.08),
        chart.x_label,
        "% of rows per bin",
        percent=True,
    )
    for share, colour in zip(shares, colours, strict=True):
        base = axes.py(0.0)
        steps = [f"M{axes.px(edges[0]):.1f} {base:.1f}"]
        for right, height in zip(edges[1:], share, strict=True):
            steps.append(f"V{axes.py(height):.1f}H{axes.px(right):.1f}")
        steps.append(f"V{base:.1f}")
        parts.append(f'<path class="area c{colour}" d="{"".join(steps)}"/>')
    medians = "; ".join(
        f"{name} has median {format_number(float(np.median(v)) if v.size else math.nan)}"
        for (name, _), v in zip(chart.series, values, strict=True)
    )
    return _svg(parts, f"{chart.title}: distribution of {chart.x_label}. {medians}")


def reliability_svg(chart: ReliabilityChart, colour: int) -> str:
    """A dot for each bin: its share of right claims over its support, its area by its number of
    claims, and a line to the diagonal, where support holds what it promises."""
    axes, parts = _axes((0.0, 1.0), (0.0, 1.0), "support", "share that is right", percent=False)
    parts.append(
        f'<path class="marker" d="M{axes.px(0):.1f} {axes.py(0):.1f}'
        f'L{axes.px(1):.1f} {axes.py(1):.1f}"/>'
    )
    most = max((n for *_, n in chart.bins), default=1)
    for support, right, n in chart.bins:
        x, y = axes.px(support), axes.py(right)
        radius = max(_LARGEST_DOT * math.sqrt(n / most), 1.5)
        parts.append(
            f'<path class="whisker c{colour}" d="M{x:.1f} {y:.1f}V{axes.py(support):.1f}"/>'
            f'<circle class="dot c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
        )
    shown = "; ".join(
        f"{n} of {support:.2f}: {right:.2f} right" for support, right, n in chart.bins
    )
    return _svg(parts, f"{chart.title}: share that is right by support. Claims: {shown}")


def interval_strip(values: Sequence[Interval | None]) -> str:
    """A small drawing of one table row: a dot and a whisker per system, on the row's own scale,
    with a line at 0 if that is inside. It repeats the numbers beside it, so it is hidden from
    screen readers."""
    width, row_height, margin = 132, 11, 6
    numbers = [n for v in values if v is not None for n in (v.value, v.lo, v.hi)]
    if not any(map(math.isfinite, numbers)):
        return ""
    low, high = _domain(np.array(numbers, np.float64), 0.0)

    def px(x: float) -> float:
        x = min(max(x, low), high)
        return margin + (x - low) / (high - low) * (width - 2 * margin)

    height = row_height * len(values) + 2
    parts = []
    if low < 0 < high:
        parts.append(f'<line class="axis" x1="{px(0):.1f}" x2="{px(0):.1f}" y1="0" y2="{height}"/>')
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value.value):
            continue
        y, colour = 1 + row_height * (index + 0.5), f"c{index % N_COLOURS}"
        if math.isfinite(value.lo) and math.isfinite(value.hi):
            parts.append(
                f'<path class="whisker {colour}" d="M{px(value.lo):.1f} {y}H{px(value.hi):.1f}"/>'
            )
        parts.append(f'<circle class="dot {colour}" cx="{px(value.value):.1f}" cy="{y}" r="3.4"/>')
    return (
        f'<svg class="strip" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'aria-hidden="true">{"".join(parts)}</svg>'
    )
