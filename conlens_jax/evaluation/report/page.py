"""From measured lenses to the page: the tables with their metrics, the summary, the examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.report.claim_tables import claim_groups, reliability_charts
from conlens_jax.evaluation.report.full_tables import full_charts, full_groups
from conlens_jax.evaluation.report.heat_map import HeatMap
from conlens_jax.evaluation.report.report_data import (
    HIGHER,
    TABLES,
    Example,
    MetricGroup,
    MetricRow,
    Report,
)
from conlens_jax.evaluation.report.svg import CurveChart, HistogramChart, Series
from conlens_jax.evaluation.row_warnings import norm_warnings, reading_warnings
from conlens_jax.evaluation.suite import HEADLINE, Evaluated
from conlens_jax.evaluation.support import Calibration
from conlens_jax.evaluation.words import Word, words_of
from conlens_jax.measurement.bootstrap import Interval
from conlens_jax.measurement.training_range import TrainingRange
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.written import before_end, written_texts


@dataclasses.dataclass(frozen=True)
class System:
    """A measured lens: ``key`` is the prefix of its metrics in metrics.json, ``name`` the title of
    its column."""

    key: str
    name: str
    evaluated: Evaluated


@dataclasses.dataclass(frozen=True)
class PageData:
    """What the page is made from.

    Attributes:
      systems: in the order of the columns.
      main: key of the system that the summary, histograms and examples are about.
      differences: title → differences of the headline metrics, main minus another system.
      records: of metrics.jsonl, by curve set ("" for the run, "control" for the control).
      facts: label → value.
      heat_maps: documents token by token.
      variables: names of what is known of every document; only in a generated corpus.
      ranked: show the best, median and worst rows before those at equal distances.
      end: the token that a text ends with, or None.
      calibration: of the claims of the main system, if it was measured.
      support: of each token of the main lens's greedy text, by row, for the rows that are shown;
        empty if it has no calibration.
      norms: of the training activations, see
        :class:`~conlens_jax.measurement.training_range.TrainingRange`.
    """

    systems: Sequence[System]
    main: str
    differences: Mapping[str, Mapping[str, Interval]]
    records: Mapping[str, Sequence[Mapping[str, Any]]]
    facts: Mapping[str, Any]
    rows: Rows
    partner_N: np.ndarray
    config: Mapping[str, Any]
    n_examples: int
    notes: Sequence[str]
    heat_maps: Sequence[HeatMap] = ()
    variables: Sequence[str] = ()
    ranked: bool = False
    end: int | None = None
    calibration: Calibration | None = None
    support: Mapping[int, Sequence[float | None]] = dataclasses.field(default_factory=dict)
    norms: tuple[float, float] | None = None


def build_report(data: PageData, tokenizer: Tokenizer) -> Report:
    """The report of a run."""
    main = next(system for system in data.systems if system.key == data.main)
    groups = [
        *(
            _group(table["title"], table.get("note", ""), table["rows"], data)
            for table in TABLES["table"]
        ),
        *claim_groups(main.evaluated.metrics),
        *full_groups(
            main.name, {s.name: s.evaluated.metrics for s in data.systems}, data.variables
        ),
        *_difference_groups(data),
    ]
    return Report(
        title=f"Consistency lens: {data.facts['model']}, layer {data.facts['layer']}",
        summary=_summary(main.evaluated.metrics, main.name),
        facts=list(data.facts.items()),
        columns=[system.name for system in data.systems],
        metric_groups=[group for group in groups if group.rows],
        curves=_curves(data.records),
        measured_curves=full_charts(main.evaluated.metrics),
        heat_maps=data.heat_maps,
        reliability=reliability_charts(
            data.calibration.measured["reliability"] if data.calibration else {}
        ),
        reliability_of=main.name,
        histograms=_histograms(main),
        examples=_examples(data, main, tokenizer),
        config=data.config,
        notes=list(data.notes),
    )


def _group(title: str, note: str, specs: Sequence[Sequence[str]], data: PageData) -> MetricGroup:
    rows = [
        MetricRow(name, explanation, better, values)
        for name, explanation, better in specs
        if any(values := [system.evaluated.metrics.get(name) for system in data.systems])
    ]
    return MetricGroup(title, note, rows)


def _difference_groups(data: PageData) -> list[MetricGroup]:
    """The differences are in the column of the main system."""
    explanations = {
        name: explanation for table in TABLES["table"] for name, explanation, _ in table["rows"]
    }
    return [
        MetricGroup(
            title,
            "Paired by document. An interval that contains 0 shows no difference.",
            [
                MetricRow(
                    name,
                    explanations[name],
                    HIGHER,
                    [
                        differences[name] if system.key == data.main else None
                        for system in data.systems
                    ],
                )
                for name in HEADLINE
            ],
        )
        for title, differences in data.differences.items()
    ]


def _summary(metrics: Mapping[str, Interval], name: str) -> str:
    show = lambda key: _two_digits(metrics[key])
    carried = metrics["kl_frac_mean"].lo > max(metrics["null_shuffle_kl_frac_mean"].hi, 0.0)
    verdict = "carries the activation" if carried else "does not carry the activation"
    return (
        f"The text {verdict} ({name}). Swapped into the model, the reconstruction from a greedy "
        f"explanation removes {show('kl_frac_mean')} of the damage that the mean activation does "
        f"to the model's prediction, and explains {show('fve_nrm')} of the directional variance of "
        f"the activations. With the text of another row: {show('null_shuffle_kl_frac_mean')} and "
        f"{show('null_shuffle_fve_nrm')}."
        + _added_sentences(metrics)
        + _audit_sentence(metrics)
        + _truth_sentence(metrics)
    )


def _two_digits(interval: Interval) -> str:
    return f"{round(interval.value, 2) + 0.0:.2f}".replace("-", "−")  # never −0.00


def _added_sentences(metrics: Mapping[str, Interval]) -> str:
    """Whether an explanation in words adds something to M's output: the words of the context to the
    next words alone and, where it was measured, the text to M's own likeliest next tokens. Empty
    for other explanations."""
    context, text = (
        [metrics.get(f"{name}_adds_{metric}") for metric in ("fve_nrm", "kl_frac_mean")]
        for name in ("context", "text")
    )
    if not all(context):
        return ""
    shown = lambda added: " and ".join(
        f"{_with_interval(interval)} {metric}"
        for interval, metric in zip(added, ("fve_nrm", "kl_frac_mean"), strict=True)
    )
    # At the two digits that are shown.
    adds = lambda added: any(round(interval.lo, 2) > 0 for interval in added)
    by_context = f"the words of the context add {shown(context)} to the next words alone."
    if adds(context):
        found = f" {by_context[0].upper()}{by_context[1:]}"
    else:
        found = f" This text only repeats M's output: {by_context}"
    if not all(text):
        return found
    verdict = "adds" if adds(text) else "adds nothing"
    return (
        f"{found} To M's own likeliest next tokens, read by an encoder trained for them, the text "
        f"as the audit encoder reads it {verdict}: {shown(text)}."
    )


def _with_interval(interval: Interval) -> str:
    lo, hi = (_two_digits(Interval(end)) for end in (interval.lo, interval.hi))
    return f"{_two_digits(interval)} [{lo}, {hi}]"


def _audit_sentence(metrics: Mapping[str, Interval]) -> str:
    """Whether the audit encoder loses more on the lens's text than on true text; empty without."""
    if "gap_frozen" not in metrics:
        return ""
    gap, skill = metrics["gap_frozen"], metrics["gap_frozen_window"]
    verdict = "loses no more than on true text" if gap.lo <= skill.hi else "loses more"
    return (
        f" A reader that never saw a decoder's text {verdict}: {_two_digits(gap)} of the variance, "
        f"and {_two_digits(skill)} on true text."
    )


def _truth_sentence(metrics: Mapping[str, Interval]) -> str:
    """How often the text is right, which no reconstruction shows; empty where it is unknown."""
    own, other = metrics.get("precision"), metrics.get("null_shuffle_precision")
    if own is None or other is None:
        return ""
    return (
        f" Of the values that it states {_two_digits(own)} are right, and {_two_digits(other)} of "
        "those that the text of another row states."
    )


def _curves(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[CurveChart]:
    charts = (
        ("Loss", "nats and squared error", ("loss",)),
        ("Terms of the loss", "unweighted", ("encoder_error", "decoder_nll", "mse", "kl", "lm")),
        (
            "Validation: KL removed",
            "kl_frac_mean",
            (
                "validation_kl_frac_greedy",
                "validation_kl_frac_sampled",
                "validation_kl_frac_shuffle",
            ),
        ),
        (
            "Validation: variance explained",
            "fve_nrm",
            ("validation_fve_nrm_greedy", "validation_fve_nrm_sampled"),
        ),
    )
    built = []
    for title, y_label, names in charts:
        series = []
        for which, entries in records.items():
            for name in names:
                points = [(r["step"], r[name]) for r in entries if r.get(name) is not None]
                if points:
                    label = " ".join(filter(None, (which, name.removeprefix("validation_"))))
                    steps, values = zip(*points, strict=True)
                    series.append(Series(label, steps, values))
        if series:
            markers = [(step, f"{stage} begins") for step, stage in _stage_starts(records)]
            built.append(CurveChart(title, "step", y_label, series, markers=markers))
    return built


def _stage_starts(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[int, str]]:
    """Steps at which another stage follows in the main run."""
    entries = records.get("", [])
    return [
        (before["step"], after["stage"])
        for before, after in zip(entries, entries[1:], strict=False)
        if before["stage"] != after["stage"]
    ]


def _histograms(main: System) -> list[HistogramChart]:
    per_row = main.evaluated.per_row
    named = (("explanation", "greedy"), ("another row's text", "null_shuffle"))
    log_kl = lambda name: np.log10(np.maximum(per_row[f"{name}.kl_at"], 1e-6))
    return [
        HistogramChart(
            "Cosine of reconstruction and activation",
            "cosine, one value per row",
            [(label, per_row[f"{name}.cos"]) for label, name in named],
        ),
        HistogramChart(
            "KL with the reconstruction swapped in",
            "log10 of nats, one value per row",
            [(label, log_kl(name)) for label, name in (*named, ("mean activation", "mean"))],
        ),
    ]


def _examples(data: PageData, main: System, tokenizer: Tokenizer) -> list[Example]:
    evaluated = main.evaluated
    top = lambda name, row: [
        (tokenizer.token(token), float(probability))
        for token, probability in zip(
            evaluated.effects[name].top_tokens[row],
            evaluated.effects[name].top_probabilities[row],
            strict=True,
        )
    ]
    examples = []
    for row, label in chosen_rows(evaluated, data.n_examples, data.ranked):
        tokens, position = data.rows.tokens_NS[row], int(data.rows.positions_N[row])
        stop = min(position + 9, int(data.rows.lengths_N[row]))
        greedy = [system.evaluated.explained.texts["greedy"][row] for system in data.systems]
        sampled = evaluated.explained.texts["sampled"][row]
        names = [*(system.name for system in data.systems), f"{main.name}, sampled"]
        other = evaluated.explained.texts["greedy"][data.partner_N[row]]
        *texts, other_text = written_texts([*greedy, sampled, other], tokenizer, data.end)
        kl, kl_mean = (float(evaluated.per_row[f"{of}.kl_at"][row]) for of in ("greedy", "mean"))
        norm = float(np.linalg.norm(np.asarray(data.rows.activations_ND[row], np.float64)))
        reasons = norm_warnings(TrainingRange(norms=data.norms), norm)
        examples.append(
            Example(
                context=tokenizer.decode(tokens[:position]),
                token_at_position=tokenizer.token(tokens[position]),
                continuation=tokenizer.decode(tokens[position + 1 : stop]),
                explanations=list(zip(names, texts, strict=True)),
                other_row_text=str(other_text),
                numbers={
                    "cos": float(evaluated.per_row["greedy.cos"][row]),
                    "KL": kl,
                    "KL, mean activation": kl_mean,
                },
                top_before=top("clean", row),
                top_after=top("greedy", row),
                label=label,
                words=_words(data, main, tokenizer, row),
                warnings={main.name: (*reasons, *reading_warnings(kl, kl_mean))},
            )
        )
    return examples


def _words(
    data: PageData, main: System, tokenizer: Tokenizer, row: int
) -> dict[str, tuple[Word, ...]]:
    """The words of the main lens's greedy text; empty without a calibration."""
    if row not in data.support:
        return {}
    tokens = before_end(main.evaluated.explained.texts["greedy"][row], data.end)
    return {main.name: words_of(list(map(tokenizer.piece, tokens)), data.support[row])}


def chosen_rows(evaluated: Evaluated, most: int, ranked: bool) -> list[tuple[int, str]]:
    """Rows and why they are shown: those of the least, the median and the most KL, if requested;
    then, at equal distances in the held-out set, rows chosen before anything was measured."""
    kl_N = evaluated.per_row["greedy.kl_at"]
    count = min(most, len(kl_N))
    if not count:
        return []
    in_advance = np.linspace(0, len(kl_N) - 1, count).astype(np.int64)
    chosen = [(int(row), "") for row in in_advance]
    if ranked:
        order = np.argsort(kl_N, kind="stable")
        places = {"least KL": 0, "median KL": len(order) // 2, "most KL": len(order) - 1}
        chosen = [(int(order[place]), label) for label, place in places.items()] + chosen
    return chosen
