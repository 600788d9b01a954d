"""The evaluation report: one HTML file that opens anywhere, for ever.

No script, no network, no external font or picture: the charts are inline SVG and the style sheet is
in the page. Every text that comes from a model, a corpus or a config is escaped, and the same
report gives the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conlens_jax.evaluation.report.heat_map import render_heat_map
from conlens_jax.evaluation.report.markup import (
    escape,
    format_interval,
    format_number,
    show_token,
    token_marks,
)
from conlens_jax.evaluation.report.report_data import (
    HIGHER,
    LOWER,
    NEITHER,
    Example,
    MetricGroup,
    MetricRow,
    Report,
    report_problems,
)
from conlens_jax.evaluation.report.style import CSS
from conlens_jax.evaluation.report.svg import (
    N_COLOURS,
    CurveChart,
    curve_svg,
    finite_values,
    histogram_svg,
    interval_strip,
    last_value,
    series_colours,
)
from conlens_jax.files.paths import local_path
from conlens_jax.files.whole import naming_full_disk
from conlens_jax.measurement.bootstrap import Interval

_OPEN_EXAMPLES = 6


def _wrap(tag: str, kind: str, content: str) -> str:
    """The content in an element, or nothing at all where there is none."""
    return f'<{tag} class="{kind}">{content}</{tag}>' if content else ""


# --- metric tables ------------------------------------------------------------------------------


def _best(row: MetricRow) -> int | None:
    """Index of the best value; None where there is no choice to make."""
    finite = [(v.value, i) for i, v in enumerate(row.values) if v and math.isfinite(v.value)]
    if len(finite) < 2 or not row.better:
        return None
    value, index = (max if row.better == HIGHER else min)(finite, key=lambda pair: pair[0])
    return index if [v for v, _ in finite].count(value) == 1 else None


def _metric_cell(value: Interval | None, best: bool) -> str:
    if value is None:
        return '<td class="none">–</td>'
    shown, interval = format_interval(value)
    shown = f"<strong>{shown}</strong>" if best else shown
    return f"<td>{shown}{f'<small>{interval}</small>' if interval else ''}</td>"


def _metric_row(row: MetricRow, strips: bool) -> str:
    arrow = {HIGHER: "↑ higher is better", LOWER: "↓ lower is better", NEITHER: ""}[row.better]
    better = f'<b class="better">{arrow}</b>' if arrow else ""
    best = _best(row)
    cells = "".join(_metric_cell(value, index == best) for index, value in enumerate(row.values))
    explanation = f"<span>{escape(row.explanation)}</span>" if row.explanation else ""
    strip = f"<td>{interval_strip(row.values)}</td>" if strips else ""
    return f'<tr><th scope="row">{escape(row.name)} {better}{explanation}</th>{cells}{strip}</tr>\n'


def _key(index: int) -> str:
    return f'<i class="key c{index % N_COLOURS}"></i>'


def _metric_group(group: MetricGroup, columns: Sequence[str]) -> str:
    strips = len(columns) > 1 and not group.columns
    columns = group.columns or columns
    heads = "".join(
        f'<th scope="col">{"" if group.columns else _key(index)}{escape(name)}</th>'
        for index, name in enumerate(columns)
    )
    strip_head = '<th scope="col" class="strips">95 % intervals</th>' if strips else ""
    note = _wrap("p", "note", escape(group.note))
    rows = "".join(_metric_row(row, strips) for row in group.rows)
    return (
        f'<div class="group"><h3>{escape(group.title)}</h3>{note}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(group.title)}">'
        f'<table class="metrics" style="--columns:{len(columns) + strips}"><thead><tr>'
        f'<th scope="col">Metric</th>{heads}{strip_head}</tr>'
        f"</thead><tbody>\n{rows}</tbody></table></div></div>\n"
    )


def _metrics(report: Report) -> str:
    groups = "".join(_metric_group(group, report.columns) for group in report.metric_groups)
    return (
        '<p class="note">Small type: 95 % bootstrap interval, documents as the unit. Bold: the '
        "best value of a row; look at the intervals before believing it.</p>" + groups
    )


# --- charts -------------------------------------------------------------------------------------


def _figure(title: str, note: str, svg: str, legend: Sequence[tuple[int, str, str]]) -> str:
    items = "".join(
        f'<li><i class="key c{colour}"></i>{escape(name)}<b>{escape(value)}</b></li>'
        for colour, name, value in legend
    )
    caption = _wrap("p", "note", escape(note))
    legend_list = _wrap("ul", "legend", items)
    return f"<figure><h3>{escape(title)}</h3>{legend_list}{svg}{caption}</figure>\n"


def _curves(charts: Sequence[CurveChart], reserved: Mapping[str, int]) -> str:
    figures = []
    for chart in charts:
        colours = series_colours([series.name for series in chart.series], reserved)
        legend = [
            (colour, series.name, format_number(last_value(series)))
            for colour, series in zip(colours, chart.series, strict=True)
        ]
        figures.append(_figure(chart.title, chart.note, curve_svg(chart, colours), legend))
    lead = '<p class="note">The number beside a name is the last value of its curve.</p>'
    return f'{lead}<div class="charts">{"".join(figures)}</div>'


def _histograms(report: Report, reserved: Mapping[str, int]) -> str:
    figures = []
    for chart in report.histograms:
        colours = series_colours([name for name, _ in chart.series], reserved)
        legend = []
        for colour, (name, values) in zip(colours, chart.series, strict=True):
            finite = finite_values(values)
            median = format_number(float(np.median(finite)) if finite.size else math.nan)
            left_out = len(values) - finite.size
            legend.append((colour, name, median + (f", {left_out} not finite" if left_out else "")))
        figures.append(_figure(chart.title, chart.note, histogram_svg(chart, colours), legend))
    lead = '<p class="note">The number beside a name is its median.</p>'
    return f'{lead}<div class="charts">{"".join(figures)}</div>'


# --- examples -----------------------------------------------------------------------------------


def _top(title: str, kind: str, top: Sequence[tuple[str, float]], scale: float) -> str:
    items = []
    for token, probability in top:
        known = math.isfinite(probability)
        width = 100 * min(max(probability, 0.0) / scale, 1.0) if known else 0.0
        items.append(
            f"<li><div><code>{show_token(token)}</code>"
            f"<span>{f'{100 * probability:.1f} %' if known else 'n/a'}</span></div>"
            f'<span class="bar"><i style="width:{width:.1f}%"></i></span></li>'
        )
    return f'<div class="{kind}"><h4>{title}</h4><ol class="top">{"".join(items)}</ol></div>'


def _predictions(example: Example) -> str:
    both = [*example.top_before, *example.top_after]
    if not both:
        return ""
    # One scale for both lists, so that bars can be compared across the swap.
    scale = max((p for _, p in both if math.isfinite(p) and p > 0), default=1.0)
    return (
        '<div class="predictions"><p>Most likely next tokens of the model</p>'
        + _top("Before the swap", "before", example.top_before, scale)
        + _top("After the swap", "after", example.top_after, scale)
        + "</div>"
    )


def _example(number: int, example: Example, reserved: Mapping[str, int]) -> str:
    chips = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{format_number(value)}</dd></div>"
        for name, value in example.numbers.items()
    )
    readings = []
    for name, text in example.explanations:
        colour = f' class="c{reserved[name]}"' if name in reserved else ""
        tokens, note = token_marks(text)
        readings.append(
            f"<div{colour}><dt>{escape(name)}</dt>"
            f'<dd><span class="text" dir="auto"{tokens}>{escape(text.strip())}</span>{note}</dd>'
            "</div>"
        )
    if example.other_row_text:
        other = escape(example.other_row_text.strip())
        readings.append(
            '<div class="other"><dt>Control: text of another row</dt>'
            f'<dd><span class="text" dir="auto">{other}</span></dd></div>'
        )
    title = f"Example {number}" + (f": {escape(example.label)}" if example.label else "")
    # The space before a word is part of many tokens; highlighted, it would look like a mistake.
    token = example.token_at_position
    word = token.lstrip(" ") if token.strip() else token
    space = token[: len(token) - len(word)]
    return (
        f'<article class="example"><header><h3>{title}</h3>'
        f"{_wrap('dl', 'chips', chips)}</header>"
        f'<div><p class="text context" dir="auto">{escape(example.context)}{space}'
        f"<mark>{show_token(word)}</mark>"
        f'<span class="dim">{escape(example.continuation)}</span></p>'
        f'<dl class="readings">{"".join(readings)}</dl></div>{_predictions(example)}</article>\n'
    )


def _examples(report: Report, reserved: Mapping[str, int]) -> str:
    cards = [_example(n, example, reserved) for n, example in enumerate(report.examples, start=1)]
    page = (
        '<p class="note">The activation is read at the highlighted token. The dimmed text is the '
        "true continuation, which the lens does not see.</p>" + "".join(cards[:_OPEN_EXAMPLES])
    )
    if cards[_OPEN_EXAMPLES:]:
        more = len(cards) - _OPEN_EXAMPLES
        page += (
            f"<details><summary>{more} more example{'s' if more > 1 else ''}</summary>"
            f"{''.join(cards[_OPEN_EXAMPLES:])}</details>"
        )
    return page


# --- config and notes ---------------------------------------------------------------------------


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _config_value(value: Any) -> str:
    if isinstance(value, str) and value:
        return escape(value)
    return escape(json.dumps(value, ensure_ascii=False, default=str))


def _config(config: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
    sections = {"general": plain} if plain else {}
    sections |= {name: value for name, value in config.items() if isinstance(value, Mapping)}
    tables = []
    for title, values in sections.items():
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{_config_value(value)}</td></tr>'
            for name, value in _flatten(values)
        )
        tables.append(
            f"<section><h3>{escape(title)}</h3><table><tbody>{rows}</tbody></table></section>\n"
        )
    return (
        "<details><summary>Every setting of this run</summary>"
        f'<div class="config">{"".join(tables)}</div></details>'
    )


# --- the page -----------------------------------------------------------------------------------

_PATH = """<ol class="path" aria-label="How a lens works">
<li class="model">model</li><li class="arrow" aria-hidden="true">→</li>
<li>activation <i>a</i></li><li class="arrow" aria-hidden="true">→</li>
<li>decoder writes <b>text</b></li><li class="arrow" aria-hidden="true">→</li>
<li>encoder reads <i>â</i></li><li class="arrow" aria-hidden="true">→</li>
<li class="model">model, with <i>â</i> in the place of <i>a</i></li></ol>
<p class="note">The better the text, the nearer <i>â</i> is to <i>a</i>, and the less the model's
predictions change when <i>â</i> takes its place.</p>
"""


def render_report(report: Report) -> str:
    """The report as one self-contained HTML page.

    Raises:
      ValueError: rows or series whose lengths do not fit; all of them in one message.
    """
    problems = list(report_problems(report))
    if problems:
        raise ValueError("\n".join(f"  - {problem}" for problem in problems))
    reserved = {name: index % N_COLOURS for index, name in enumerate(report.columns)}
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    sections = [
        ("metrics", "Metrics", _metrics(report) if report.metric_groups else ""),
        (
            "scaling",
            "More text, more tries",
            _curves(report.measured_curves, reserved) if report.measured_curves else "",
        ),
        ("heat", "Token by token", "".join(map(render_heat_map, report.heat_maps))),
        ("examples", "Examples", _examples(report, reserved) if report.examples else ""),
        ("curves", "Training", _curves(report.curves, reserved) if report.curves else ""),
        ("rows", "Row by row", _histograms(report, reserved) if report.histograms else ""),
        ("notes", "Notes and limits", _wrap("ul", "notes", notes)),
        ("config", "Configuration", _config(report.config) if report.config else ""),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    facts = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in report.facts
    )
    body = "".join(
        f'<section id="{name}"><h2>{title}</h2>{content}</section>\n'
        for name, title, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n'
        f"<title>{escape(report.title)}</title>\n<style>{CSS}</style></head>\n"
        '<body><div class="page"><header><p class="eyebrow">Consistency lens report</p>'
        f'<h1>{escape(report.title)}</h1><p class="lead">{escape(report.summary)}</p>{_PATH}'
        f"{_wrap('dl', 'facts', facts)}{_wrap('nav', 'contents', links)}</header>\n"
        f"<main>{body}</main></div></body></html>\n"
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Writes the page under a temporary name beside ``path`` and renames it, so that a reader never
    meets half a page. Makes the folder where it is missing.

    Raises:
      ValueError: see :func:`render_report`; nothing is written then.
    """
    path = local_path(path)
    page = render_report(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming_full_disk(path):
            temporary.write_text(page, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
