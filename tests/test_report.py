"""The report page, read back as a tree: what is on it, and what can never be on it."""

from __future__ import annotations

import dataclasses
import math
import re
import stat
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from conlens_jax.evaluation.report import svg
from conlens_jax.evaluation.report.heat_map import STEPS, HeatMap, HeatToken
from conlens_jax.evaluation.report.markup import escape, format_interval, format_number, show_token
from conlens_jax.evaluation.report.report_data import Example, MetricGroup, MetricRow, Report
from conlens_jax.evaluation.report.svg import CurveChart, HistogramChart, ReliabilityChart, Series
from conlens_jax.evaluation.report.writing import render_report, write_report
from conlens_jax.evaluation.words import words_of
from conlens_jax.measurement.bootstrap import Interval
from conlens_jax.models.written import Written

NAN, INF = math.nan, math.inf


def _report(text=lambda name: name, number=0.5, **changes):
    """A report with every part filled in; ``text`` makes each string from the name of its field."""
    interval = Interval(number, number - 0.1, number + 0.1)
    example = Example(
        context=text("context"),
        token_at_position=text("token"),
        continuation=text("continuation"),
        explanations=[(text("explanation column"), text("explanation"))],
        other_row_text=text("other row"),
        numbers={text("number name"): number},
        top_before=[(text("before token"), number)],
        top_after=[(text("after token"), number)],
        label=text("example label"),
    )
    report = Report(
        title=text("title"),
        summary=text("summary"),
        facts=[(text("fact label"), text("fact value"))],
        columns=[text("column 1"), text("column 2")],
        metric_groups=[
            MetricGroup(
                text("group title"),
                text("group note"),
                [MetricRow(text("metric"), text("meaning"), "higher", [interval, None])],
            )
        ],
        curves=[
            CurveChart(
                text("curve title"),
                text("curve x"),
                text("curve y"),
                [Series(text("curve series"), [0, 1, 2], [1.0, number, 2.0])],
                text("curve note"),
                [(1, text("marker"))],
            )
        ],
        histograms=[
            HistogramChart(
                text("histogram title"),
                text("histogram x"),
                [(text("histogram series"), [0.1, number, 0.9])],
                text("histogram note"),
            )
        ],
        examples=[example],
        config={text("section"): {text("key"): text("value")}, text("plain key"): 3},
        notes=[text("remark")],
        measured_curves=[
            CurveChart(
                text("measured title"),
                text("measured x"),
                text("measured y"),
                [Series(text("measured series"), [1, 2], [0.5, number])],
            )
        ],
        heat_maps=[
            HeatMap(
                text("heat title"),
                text("heat note"),
                text("heat unit"),
                [HeatToken(text("cold token")), HeatToken(text("hot token"), number, text("tip"))],
            )
        ],
        reliability=[ReliabilityChart(text("reliability title"), [(0.5, 0.25, 3)])],
    )
    return dataclasses.replace(report, **changes)


def _tree(page):
    """The page is written so that it is XML as well: any tag left open or unescaped text fails."""
    return ET.fromstring(page.removeprefix("<!doctype html>\n"))


def _text(element):
    return "".join(element.itertext())


def _has_class(element, name):
    return name in element.get("class", "").split()


def _heat_section(heat_map):
    """Its part of a page."""
    tree = _tree(render_report(Report("t", "s", [], [], [], heat_maps=[heat_map])))
    (section,) = tree.iter("section")
    return section


def _metric_cells(page):
    tables = [table for table in _tree(page).iter("table") if _has_class(table, "metrics")]
    return [
        [_text(cell) for cell in row.findall("td")] for table in tables for row in table.iter("tr")
    ]


def test_every_string_is_on_the_page_and_none_as_markup():
    names = []

    def hostile(name):
        names.append(f"<script>{name}</script>")
        return f'<script>{name}</script>" onload="x\' & </style>\x00\ud800'

    page = render_report(_report(hostile))
    tree = _tree(page)
    shown = _text(tree)
    assert len(set(names)) >= 30
    assert [name for name in names if name not in shown] == []
    assert "<script" not in page and page.count("</style>") == 1
    assert not any(key.startswith("on") for element in tree.iter() for key in element.attrib)
    page.encode("utf-8")


def test_the_page_needs_nothing_from_outside():
    page = render_report(_report())
    for forbidden in ("http", "//", "url(", "@import", "src=", "<link", "<script", "<img", "<use"):
        assert forbidden not in page
    links = [element.get("href") for element in _tree(page).iter("a")]
    ids = [element.get("id") for element in _tree(page).iter() if element.get("id")]
    assert links and links == [f"#{name}" for name in ids]


def test_html_parser_sees_balanced_tags():
    class Balance(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.most = [], 0

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)
            self.most = max(self.most, len(self.open))

        def handle_startendtag(self, tag, attrs):
            assert tag in {"meta", "line", "path", "circle"}

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(render_report(_report()))
    assert parser.open == [] and parser.most > 8


def test_headings_tables_and_charts_are_accessible():
    tree = _tree(render_report(_report()))
    levels = [int(e.tag[1]) for e in tree.iter() if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(head.get("scope") in ("col", "row") for head in tree.iter("th"))
    charts = [e for e in tree.iter("svg") if _has_class(e, "chart")]
    titles = ("reliability title", "measured title", "curve title", "histogram title")
    for chart, title in zip(charts, titles, strict=True):
        assert title in chart.get("aria-label") and chart.find("title").text
    assert all(e.get("aria-hidden") for e in tree.iter("svg") if _has_class(e, "strip"))
    assert {meta.get("name") for meta in tree.iter("meta")} >= {"viewport", "color-scheme"}
    assert tree.get("lang") == "en"


def test_every_metric_and_interval_is_in_its_row():
    rows = [
        MetricRow("fve", "", "higher", [Interval(0.4, 0.35, 0.45), Interval(0.55, 0.5, 0.6)]),
        MetricRow("kl", "", "lower", [Interval(12.344, 11, 14), None]),
        MetricRow("floor", "", "lower", [Interval(2.3e-6, 1.9e-6, 2.8e-6), Interval(-0.25)]),
    ]
    page = render_report(_report(metric_groups=[MetricGroup("one", "", rows)]))
    cells = [row[:2] for row in _metric_cells(page) if row]
    assert cells == [
        ["0.4000.350 to 0.450", "0.5500.500 to 0.600"],
        ["12.3411.00 to 14.00", "–"],
        ["2.3e−61.9e−6 to 2.8e−6", "−0.250"],
    ]


def test_a_table_may_have_columns_of_its_own():
    row = MetricRow("lens", "", "", [Interval(0.25, 0.2, 0.3)])
    page = render_report(_report(metric_groups=[MetricGroup("one", "", [row], ["share"])]))
    table = next(table for table in _tree(page).iter("table") if _has_class(table, "metrics"))
    assert [_text(head) for head in table.find("thead").iter("th")] == ["Metric", "share"]
    assert not [e for e in table.iter("svg")]
    with pytest.raises(ValueError, match="'lens' has 1 values for 2 columns"):
        render_report(_report(metric_groups=[MetricGroup("one", "", [row], ["a", "b"])]))


def test_heat_map_colours_rise_with_the_value_and_texts_can_be_reached():
    """By keyboard and by tap: every measured token takes the focus and holds its text."""
    values = [None, 0.0, *STEPS, 1e9, NAN]
    tokens = [HeatToken(f"t{index}", value, f"says {index}") for index, value in enumerate(values)]
    tree = _heat_section(HeatMap("title", "note", "nats", tokens))
    hot = [e for e in tree.iter("span") if _has_class(e, "hot")]
    colours = [e.get("class").split()[1] for e in hot]
    assert colours == [f"h{step}" for step in range(len(STEPS) + 1)] + [f"h{len(STEPS)}"]
    assert all(e.get("tabindex") == "0" for e in hot)
    assert [_text(e.find("span/span")) for e in hot] == [f"says {i}" for i in range(1, 8)]
    assert len([e for e in tree.iter("span") if _has_class(e, "cold")]) == 2


def test_words_of_a_heat_map_are_apart_where_they_carry_no_spaces():
    tokens = [HeatToken("once"), HeatToken("upon")]
    body = lambda spaced: _heat_section(HeatMap("", "", "", tokens, spaced)).findall("p")[-1]
    assert _text(body(True)) == "once upon" and _text(body(False)) == "onceupon"


def test_reliability_diagram_by_its_geometry():
    """Each dot is where its numbers are on the axes, below the diagonal where too few are right."""
    bins = [(0.25, 0.25, 40), (0.5, 0.75, 10), (0.9, 0.4, 40)]
    chart = ReliabilityChart("All claims", bins)
    assert chart.calibration_error == pytest.approx((10 * 0.25 + 40 * 0.5) / 90)
    report = Report("t", "s", [], ["a", "b"], [], reliability=[chart], reliability_of="b")
    (section,) = _tree(render_report(report)).iter("section")
    legend = [_text(entry) for entry in section.iter("li")]
    assert legend == ["claims90", "calibration error0.250"]
    (drawing,) = section.iter("svg")
    dots = [e for e in drawing.iter("circle")]
    (diagonal,) = [e for e in drawing.iter("path") if _has_class(e, "marker")]
    x0, y0, x1, y1 = map(float, re.findall(r"[\d.]+", diagonal.get("d")))
    assert x0 < x1 and y0 > y1
    for dot, (support, right, _) in zip(dots, bins, strict=True):
        assert float(dot.get("cx")) == pytest.approx(x0 + support * (x1 - x0), abs=0.06)
        assert float(dot.get("cy")) == pytest.approx(y0 + right * (y1 - y0), abs=0.06)
        assert _has_class(dot, "c1")
    large, small, _ = (float(dot.get("r")) for dot in dots)
    assert large == 2 * small  # four times the claims
    for dot, line in zip(dots, [e for e in drawing.iter("path") if e != diagonal], strict=True):
        x, y, end = map(float, re.findall(r"[\d.]+", line.get("d")))
        assert (x, y) == (float(dot.get("cx")), float(dot.get("cy")))
        assert end == pytest.approx(y0 + (x - x0) / (x1 - x0) * (y1 - y0), abs=0.06)
    ticks = [e for e in drawing.iter("text") if _text(e) == "1.0"]
    assert len(ticks) == 2 and float(ticks[1].get("x")) == pytest.approx(x1, abs=4)


@pytest.mark.parametrize(
    ("better", "values", "best"),
    [
        ("higher", [0.4, 0.6, 0.5], ["0.600"]),
        ("lower", [0.4, 0.6, 0.5], ["0.400"]),
        ("", [0.4, 0.6, 0.5], []),
        ("higher", [0.6, 0.6, 0.5], []),
        ("higher", [NAN, 0.6, 0.5], ["0.600"]),
        ("lower", [-INF, NAN, 0.5], []),
    ],
)
def test_only_a_single_best_value_is_bold(better, values, best):
    row = MetricRow("m", "", better, [Interval(v) for v in values])
    report = _report(columns=["a", "b", "c"], metric_groups=[MetricGroup("g", "", [row])])
    tree = _tree(render_report(report))
    assert [_text(e) for e in tree.iter("strong")] == best


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e308, -1e308, 0.0])
def test_values_that_are_not_finite_or_huge_do_not_break_the_page(bad):
    with np.errstate(all="raise"):
        page = render_report(_report(number=bad))
    tree = _tree(page)
    for element in tree.iter():
        for name in ("d", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
            assert not re.search("nan|inf|e[+-]", element.get(name, "").lower())
    assert not re.search("width:(nan|inf|-)", page)


def test_empty_report_and_empty_series():
    empty = Report("t", "s", [], [], [])
    assert [e.tag for e in _tree(render_report(empty)).iter("section")] == []
    report = _report(
        curves=[CurveChart("c", "x", "y", []), CurveChart("c", "x", "y", [Series("s", [], [])])],
        histograms=[HistogramChart("h", "x", []), HistogramChart("h", "x", [("s", [NAN])])],
        measured_curves=[],
        reliability=[],
    )
    page = _tree(render_report(report))
    assert len([e for e in page.iter("svg") if _has_class(e, "chart")]) == 4
    assert "1 not finite" in _text(page)


def test_wrong_lengths_are_named_all_at_once():
    report = _report(
        metric_groups=[MetricGroup("g", "", [MetricRow("short", "", "best", [None])])],
        curves=[CurveChart("c", "x", "y", [Series("ragged", [1, 2], [1])])],
    )
    with pytest.raises(ValueError) as error:
        render_report(report)
    for part in ("'short' has 1 values for 2 columns", "better must be", "'ragged': x has 2"):
        assert part in str(error.value)


def test_words_of_an_example_have_their_support():
    one = _report().examples[0]
    name = one.explanations[0][0]
    words = words_of([" red", " <fox>", " |"], [0.95, 0.2, None])
    page = render_report(_report(examples=[dataclasses.replace(one, words={name: words})]))
    assert 'title="support 0.95"' in page and 'class="word sure"' in page
    assert 'aria-label="&lt;fox&gt;, support 0.20">&lt;fox&gt;</span> |' in page
    assert "are bold" in page and "No support" not in page and 'class="reason"' not in page
    warned = dataclasses.replace(one, words={name: words}, warnings={name: ("<no>",)})
    page = render_report(_report(examples=[warned]))
    assert "not measured on rows with a warning" in page and "<b>!</b> &lt;no&gt;" in page
    assert "No support: how often" in render_report(_report())


def test_examples_beyond_the_first_are_folded_and_none_is_lost():
    one = _report().examples[0]
    examples = [dataclasses.replace(one, context=f"context {i}.") for i in range(9)]
    tree = _tree(render_report(_report(examples=examples, config={})))
    (folded,) = tree.iter("details")
    assert _text(folded.find("summary")) == "3 more examples"
    assert len(list(tree.iter("article"))) == 9 and len(list(folded.iter("article"))) == 3
    assert all(f"context {i}." in _text(tree) for i in range(9))


def test_example_marks_the_token_and_scales_both_lists_alike():
    example = dataclasses.replace(
        _report().examples[0],
        context="walked to the",
        token_at_position=" market",
        continuation=" to buy",
        top_before=[(" to", 0.5), ("\n", 0.25)],
        top_after=[(" and", 0.1)],
    )
    page = render_report(_report(examples=[example]))
    (article,) = _tree(page).iter("article")
    assert [_text(mark) for mark in article.iter("mark")] == ["market"]
    (context,) = [e for e in article.iter("p") if _has_class(e, "context")]
    assert _text(context) == "walked to the market to buy"
    widths = [e.get("style") for e in article.iter("i")]
    assert widths == ["width:100.0%", "width:50.0%", "width:20.0%"]
    assert "⏎" in _text(article) and "50.0 %" in _text(article)


def test_numbers_of_a_text_stand_with_the_tokens_that_they_are_of():
    texts = {"whole": Written("a fox", [5, 17], True), "other": Written("a f\ufffd", [5, 9], False)}
    example = dataclasses.replace(_report().examples[0], explanations=list(texts.items()))
    page = render_report(_report(examples=[example]))
    assert page.count('data-tokens="5 17"') == page.count('data-tokens="5 9"') == 1
    assert page.count("gives other tokens") == 1
    tokens = [HeatToken("x", 0.5, text) for text in texts.values()]
    page = ET.tostring(_heat_section(HeatMap("title", "note", "nats", tokens)), encoding="unicode")
    assert page.count("data-tokens=") == 2 and page.count("gives other tokens") == 1


def test_config_is_flattened_into_sections():
    config = {"run_dir": "r", "model": {"path": "", "deep": {"x": 1, "flag": True}}}
    tree = _tree(render_report(_report(config=config)))
    (section,) = [e for e in tree.iter("section") if e.get("id") == "config"]
    rows = {_text(row.find("th")): _text(row.find("td")) for row in section.iter("tr")}
    assert rows == {"run_dir": "r", "path": '""', "deep.x": "1", "deep.flag": "true"}


def test_same_report_same_bytes_and_the_file_is_whole(tmp_path):
    path = tmp_path / "deep" / "report.html"
    assert write_report(_report(), path) == path
    first = path.read_bytes()
    write_report(_report(), path)
    assert path.read_bytes() == first == render_report(_report()).encode()
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
    with pytest.raises(ValueError):
        write_report(_report(columns=["one"]), path)
    assert path.read_bytes() == first


def test_a_failed_rename_keeps_the_old_page_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(source, target):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        write_report(_report(), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_real_report_stays_small():
    steps = np.arange(20_000)
    noise = np.random.default_rng(0).normal(size=20_000)
    curves = [CurveChart("c", "x", "y", [Series("s", steps, noise)] * 2)] * 6
    histograms = [HistogramChart("h", "x", [("s", noise)] * 4)] * 4
    examples = list(_report().examples) * 24
    page = render_report(_report(curves=curves, histograms=histograms, examples=examples))
    assert len(page.encode()) < 200_000


# --- charts -------------------------------------------------------------------------------------


def _curve_paths(*series, **options):
    chart = CurveChart("c", "x", "y", series, **options)
    tree = ET.fromstring(svg.curve_svg(chart, [0] * len(series)))
    return [e.get("d") for e in tree.iter("path") if _has_class(e, "line")]


def _points(path):
    return np.array(
        [[float(n) for n in p.split()] for p in re.findall(r"[ML]([-\d.]+ [-\d.]+)", path)]
    )


def test_curve_is_linear_in_the_data_and_points_up():
    (path,) = _curve_paths(Series("s", [0, 1, 4], [10.0, 12.0, 18.0]))
    points = _points(path)
    (dx1, dy1), (dx2, dy2) = np.diff(points, axis=0)
    assert dx2 == pytest.approx(3 * dx1, abs=0.3) and dx1 > 0
    assert dy2 == pytest.approx(3 * dy1, abs=0.3) and dy1 < 0
    assert points.min() > 0 and (points < [svg.WIDTH, svg.HEIGHT]).all()


def test_curves_of_a_chart_share_their_axes():
    low, high = _curve_paths(Series("a", [0, 1], [0, 0]), Series("b", [0, 1], [1, 1]))
    assert _points(low)[0, 1] > _points(high)[0, 1] + 100


def test_a_value_that_is_not_finite_leaves_a_gap():
    (path,) = _curve_paths(Series("s", [0, 1, 2, 3, 4], [1, 2, NAN, INF, 3]))
    assert path.count("M") == 2 and len(_points(path)) == 3


def test_thinning_keeps_a_spike_and_the_order():
    x, y = np.arange(10_000.0), np.zeros(10_000)
    y[5_432], y[7_000] = 9.0, -4.0
    thin_x, thin_y = svg.thin(x, y)
    assert len(thin_x) <= 240 and (np.diff(thin_x) > 0).all()
    assert thin_y[list(thin_x).index(5_432)] == 9 and thin_y.min() == -4
    y[:] = NAN
    assert np.isnan(svg.thin(x, y)[1]).all()


def test_marker_stands_at_its_step():
    chart = CurveChart("c", "x", "y", [Series("s", [0, 10], [0, 1])], markers=[(5, "joint")])
    tree = ET.fromstring(svg.curve_svg(chart, [0]))
    (marker,) = [e.get("d") for e in tree.iter("path") if _has_class(e, "marker")]
    ends = _points(_curve_paths(*chart.series)[0])[:, 0]
    assert float(re.match(r"M([\d.]+)", marker)[1]) == pytest.approx(ends.mean(), abs=0.2)
    assert "joint" in _text(tree)


def test_histogram_heights_are_shares_over_common_bins():
    chart = HistogramChart("h", "x", [("a", [0.0] * 30 + [1.0] * 10), ("b", [0.0] * 2)])
    tree = ET.fromstring(svg.histogram_svg(chart, [0, 1]))
    first, second = [e.get("d") for e in tree.iter("path") if _has_class(e, "area")]
    tops = [float(v) for v in re.findall(r"V([\d.]+)", first)]
    base = tops[-1]
    assert base - tops[0] == pytest.approx(3 * (base - tops[-2]), abs=0.4)
    assert base - float(re.search(r"V([\d.]+)", second)[1]) == pytest.approx(
        (base - tops[0]) / 0.75, abs=0.4
    )


def test_interval_strip_orders_dots_and_leaves_out_missing_ones():
    values = [Interval(0.1, 0.0, 0.2), None, Interval(0.5, 0.4, 0.6), Interval(NAN)]
    tree = ET.fromstring(svg.interval_strip(values))
    dots = [(float(e.get("cx")), e.get("class")) for e in tree.iter("circle")]
    assert [kind for _, kind in dots] == ["dot c0", "dot c2"]
    assert dots[0][0] < dots[1][0]
    whisker = next(tree.iter("path")).get("d")
    start, end = (float(n) for n in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", whisker).groups())
    assert start < dots[0][0] < end < dots[1][0]
    assert svg.interval_strip([None, Interval(NAN)]) == ""


def test_systems_keep_their_colour_and_others_avoid_it():
    assert svg.series_colours(["train", "joint", "val"], {"warm": 0, "joint": 1}) == [0, 1, 2]
    assert svg.series_colours([str(i) for i in range(8)], {})[-2:] == [0, 1]


@pytest.mark.parametrize(
    ("low", "high", "ticks", "labels"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-3, 7, [-2, 0, 2, 4, 6], ["−2", "0", "2", "4", "6"]),
        (0, 20_000, [0, 5000, 10_000, 15_000, 20_000], ["0", "5k", "10k", "15k", "20k"]),
        (2, 2, [2], ["2.000"]),
    ],
)
def test_ticks_are_round_numbers(low, high, ticks, labels):
    assert svg.nice_ticks(low, high) == pytest.approx(ticks)
    assert svg.tick_labels(svg.nice_ticks(low, high)) == labels


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.6234, "0.623"),
        (0, "0"),
        (-0.0, "0"),
        (12.3449, "12.34"),
        (123.45, "123.5"),
        (45_678.9, "45,679"),
        (3.21e-5, "3.2e−5"),
        (-2.5e7, "−2.5e7"),
        (NAN, "n/a"),
        (-INF, "−∞"),
    ],
)
def test_numbers(value, shown):
    assert format_number(value) == shown


def test_intervals_have_equal_decimals():
    assert format_interval(Interval(9.5, 8.0, 11.25)) == ("9.50", "8.00 to 11.25")
    assert format_interval(Interval(0.5)) == ("0.500", "")
    assert format_interval(Interval(34.7, 11.5, math.inf)) == ("34.70", "11.50 or more")
    assert format_interval(Interval(-0.0001, -0.02, 0.01)) == ("0.000", "−0.020 to 0.010")


def test_tokens_of_white_space_are_visible_and_text_is_clean():
    assert [show_token(t) for t in (" to", " ", "\n\n", "", "<b>")] == [
        " to",
        "␣",
        "⏎⏎",
        "∅",
        "&lt;b&gt;",
    ]
    assert escape("a\x00b\udc80c\td'\"&") == "a\ufffdb\ufffdc\td&#x27;&quot;&amp;"
