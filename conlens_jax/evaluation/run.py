"""Evaluating a run: all its lenses on the same held-out rows; metrics.json and report.html."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conlens_jax.config import ConfigError, to_json_dict
from conlens_jax.data.extract import TEST
from conlens_jax.embedded.language_model import STATISTICS_FILE
from conlens_jax.evaluation.claims import ClaimReader
from conlens_jax.evaluation.full import Studies
from conlens_jax.evaluation.report.document_heat import document_heat
from conlens_jax.evaluation.report.heat_map import HeatMap
from conlens_jax.evaluation.report.page import PageData, System, build_report, chosen_rows
from conlens_jax.evaluation.report.writing import write_report
from conlens_jax.evaluation.studies.claims import claim_truth
from conlens_jax.evaluation.studies.measured_claims import measured_claims
from conlens_jax.evaluation.studies.said_words import SaidWords
from conlens_jax.evaluation.studies.word_parts import OTHERS, WordParts
from conlens_jax.evaluation.suite import HEADLINE, Evaluated, Suite, attribute_token_ids
from conlens_jax.evaluation.support import SUPPORT_FILE, Calibration
from conlens_jax.evaluation.tracking import track_evaluation
from conlens_jax.lens.spec import init_lens
from conlens_jax.measurement.bootstrap import Interval
from conlens_jax.measurement.metric_files import MEASURED_STEP, flatten, write_metrics
from conlens_jax.models.param_table import Params
from conlens_jax.models.written import before_end
from conlens_jax.parallel.preemption import leave_together
from conlens_jax.parallel.processes import broadcast_from_first
from conlens_jax.tracking.records import read_metrics
from conlens_jax.training.checkpoint import all_steps, read_metadata
from conlens_jax.training.run import placed
from conlens_jax.training.run_folder import BASELINE, CONTROL, checkpoint_of, load_lens
from conlens_jax.training.session import Session

_STATISTICS = {
    "lm_loss": "{:.3f} nats per token",
    "generator_entropy": "{:.3f} nats per token",
    "answers_right": "{:.3f} of M's answers",
    "exact_answers": "{:.3f} of the documents",
}
"""Statistics of an embedded model, and how they are shown."""
NAMES = {"warm": "warm start", "joint": "joint training", "control": "matched-compute control"}


@dataclasses.dataclass(frozen=True)
class _Lens:
    """A checkpoint to be measured."""

    key: str
    folder: Path
    step: int


@dataclasses.dataclass(frozen=True)
class _Results:
    """The measurements of all lenses of a run; ``main`` is the requested one."""

    main: _Lens
    suite: Suite
    systems: list[System]
    heat_maps: list[HeatMap]
    has_baseline: bool
    studies: Studies | None
    calibration: Calibration | None
    support: Mapping[int, Sequence[float | None]]


def evaluate_run(session: Session, checkpoint: str | Path) -> Path:
    """Measures a checkpoint, and the warm start and the control of its run where they exist.

    Several processes measure together; only the first one writes.

    Args:
      checkpoint: a run folder (its last checkpoint is used) or one step's folder in
        ``<run>/checkpoints``.

    Returns:
      The path of ``report.html``; ``metrics.json`` and ``metrics.csv`` are beside it, in the run
      folder, and so is ``support.json`` where claims can be checked. The other three also go to
      W&B, see :func:`~conlens_jax.evaluation.tracking.track_evaluation`.

    Raises:
      ValueError: no checkpoint there, or one of another model or lens.
    """
    config, console = session.config, session.console
    lenses, run_folder = _find_lenses(checkpoint)
    main = lenses[-1] if lenses[-1].key != CONTROL else lenses[-2]
    metadata = read_metadata(main.folder, main.step)
    found, wanted = session.model.weights_hash, metadata["weights_hash"]
    if found != wanted:
        raise ConfigError(
            f"model.path: the checkpoint {main.folder / str(main.step)} was trained on "
            f"{metadata['model_id']}, whose weights ({wanted[:12]}) are not those of "
            f"{session.model.model_id} ({found[:12]} in {session.model.folder})"
        )
    held_out, reference = session.held_out, session.reference
    count = min(config.evaluate.rows or len(held_out), len(held_out))
    tokenizer = session.model.tokenizer
    template, frozen = init_lens(
        session.model.params, session.spec, reference.mean_D, reference.scale
    )
    template = placed(template, session)
    baseline = _load_baseline(run_folder, template)
    suite = Suite.make(
        session.measurer(lambda: leave_together("the same command evaluates again")),
        held_out.rows(np.arange(count)),
        reference,
        config.warm,
        attribute_token_ids(config.corpus.kind, tokenizer),
        n_resamples=config.evaluate.bootstrap,
        seed=config.evaluate.seed,
        baseline=baseline,
    )
    studies = None
    if config.evaluate.suite != "basic":
        studies = Studies.make(session, suite, template, frozen, run_folder)
    truth = claim_truth(config, suite, tokenizer)
    # On test documents the calibration is tested that the validation documents gave.
    on_validation = (
        Calibration.of_step(run_folder, main.step) if config.evaluate.split == TEST else None
    )
    word_parts = WordParts.of(config.target, tokenizer, suite)
    systems, heat_maps, calibration, support_of_examples = [], [], None, {}
    for lens in lenses:
        trainable = load_lens(lens.folder, template, lens.step)
        evaluated = suite.evaluate(trainable, frozen)
        more = {}
        if truth is not None:
            is_main = lens == main
            found, of_claims, log_probs_NT = measured_claims(
                suite,
                truth,
                evaluated,
                *(trainable, frozen),
                known=on_validation if is_main else None,
                samples=config.evaluate.claim_samples if is_main else 0,
            )
            calibration = found if is_main else calibration
            more |= of_claims
            if is_main and found is not None:
                support_of_examples = _support_of_examples(
                    session, truth.reader, found, evaluated, log_probs_NT
                )
        if isinstance(truth, SaidWords):
            more |= truth.truth(evaluated)
        if word_parts is not None and (lens == main or studies is not None):
            more |= word_parts.of_lens(evaluated, trainable, frozen)
        if studies is not None:
            more |= studies.of_lens(evaluated, trainable)
            if lens == main:
                more |= studies.of_main_lens(evaluated, trainable)
                heat_maps = [document_heat(suite, trainable, frozen, tokenizer)]
        evaluated = dataclasses.replace(evaluated, metrics={**evaluated.metrics, **more})
        systems.append(System(lens.key, NAMES.get(lens.key, lens.key), evaluated))
        headline = {name: evaluated.metrics[name].value for name in HEADLINE}
        console.line("evaluate", lens=lens.key, step=lens.step, **headline)
    _print_table(session, systems)
    results = _Results(
        *(main, suite, systems, heat_maps, baseline is not None, studies, calibration),
        support=support_of_examples,
    )
    return Path(broadcast_from_first(lambda: str(_write(session, run_folder, results))))


def _support_of_examples(
    session: Session,
    reader: ClaimReader,
    calibration: Calibration,
    evaluated: Evaluated,
    log_probs_NT: np.ndarray,
) -> dict[int, list[float | None]]:
    """The support of each token of the greedy texts that the report shows, by row."""
    evaluate = session.config.evaluate
    shown = chosen_rows(evaluated, evaluate.n_examples, ranked=evaluate.suite != "basic")
    texts_NT = evaluated.explained.texts["greedy"]
    tokens = lambda row: before_end(texts_NT[row], session.spec.end)
    return {row: calibration.of_tokens(reader, tokens(row), log_probs_NT[row]) for row, _ in shown}


def _write(session: Session, run_folder: Path, results: _Results) -> Path:
    """Writes ``metrics.json``, ``metrics.csv`` and ``report.html``; returns the report's path."""
    config, suite, main = session.config, results.suite, results.main.key
    measured = {system.key: system.evaluated for system in results.systems}
    differences = _differences(suite, measured, main)
    statistics = _model_statistics(session.model.folder)
    metrics_of = {key: evaluated.metrics for key, evaluated in measured.items()}
    flat = flatten(metrics_of, main, differences, statistics)
    write_metrics(run_folder, flat, statistics, results.main.step)
    reference = suite.reference
    documents = len(np.unique(suite.rows.documents_N))
    facts = {
        "model": session.model.model_id,
        "layer": session.spec.layer,
        "rows": f"{len(suite.rows)} rows of {documents} held-out documents "
        f"({config.evaluate.split})",
        "T": f"{'' if session.spec.end is None else 'at most '}{session.spec.text_len} tokens",
        "R": f"{reference.resultant:.3f}, on {reference.n_rows} training rows",
        "checkpoint": f"step {results.main.step}",
        **{name: _STATISTICS[name].format(value) for name, value in statistics.items()},
        "weights": session.model.weights_hash[:12],
    }
    if config.evaluate.split != TEST:
        (run_folder / SUPPORT_FILE).unlink(missing_ok=True)
    if results.calibration is not None and config.evaluate.split != TEST:
        measured_on = {MEASURED_STEP: results.main.step, "rows": facts["rows"]}
        results.calibration.with_facts(measured_on).write(run_folder)
    data = PageData(
        systems=results.systems,
        main=main,
        differences={
            f"{NAMES[main].capitalize()} minus {NAMES[key]}": values
            for key, values in differences.items()
        },
        records=_records(run_folder),
        facts=facts,
        rows=suite.rows,
        partner_N=suite.partner_N,
        config=to_json_dict(config),
        n_examples=config.evaluate.n_examples,
        notes=_notes(session, measured, results.has_baseline),
        heat_maps=results.heat_maps,
        variables=() if results.studies is None else results.studies.variables,
        ranked=results.studies is not None,
        end=session.spec.end,
        support=results.support,
        norms=suite.reference.norms,
        calibration=results.calibration,
    )
    page = build_report(data, session.model.tokenizer)
    report = write_report(page, run_folder / "report.html")
    track_evaluation(config, run_folder, session.console)
    return report


def _find_lenses(checkpoint: str | Path) -> tuple[list[_Lens], Path]:
    """Warm start, the checkpoint itself, and the control; and the run folder."""
    folder, step = checkpoint_of(checkpoint)
    step = read_metadata(folder, step)["step"]  # raises if there is none
    metadata = read_metadata(folder, step)
    stage, warm_steps = metadata["stage"], metadata["config"]["warm"]["steps"]
    lenses = [_Lens(stage, folder, step)]
    if stage == "joint" and warm_steps in all_steps(folder):
        lenses.insert(0, _Lens("warm", folder, warm_steps))
    control = folder.parent / CONTROL / "checkpoints"
    if stage == "joint" and all_steps(control):
        lenses.append(_Lens(CONTROL, control, all_steps(control)[-1]))
    return lenses, folder.parent


def _load_baseline(run_folder: Path, template: Params) -> Params | None:
    """The encoder of the run's baseline, if it has one."""
    folder = run_folder / BASELINE
    if not all_steps(folder / "checkpoints"):
        return None
    encoder = {"decoder": {}, "encoder": template["encoder"]}
    return {"encoder": load_lens(folder, encoder)["encoder"]}


def _differences(
    suite: Suite, measured: dict[str, Evaluated], main: str
) -> dict[str, dict[str, Interval]]:
    return {
        key: suite.differences(measured[main], evaluated)
        for key, evaluated in measured.items()
        if key != main
    }


def _model_statistics(folder: Path) -> dict[str, float]:
    """The embedded model's own loss, its corpus's entropy and its share of right answers;
    empty for other models."""
    file = folder / STATISTICS_FILE
    if not file.exists():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    return {name: values[name] for name in _STATISTICS if name in values}


def _records(run_folder: Path) -> dict[str, list[dict[str, Any]]]:
    files = {"": run_folder / "metrics.jsonl", CONTROL: run_folder / CONTROL / "metrics.jsonl"}
    return {name: read_metrics(file) for name, file in files.items() if file.exists()}


_TAUGHT = {
    "window": "Supervised windows contain the {warm.before} source tokens up to P and the "
    "{warm.after} that actually follow. So the explanations of a warm start are what was just said "
    "and what comes next, learnt from the source text; statements in them are taught, not "
    "discovered.",
    "words": "The warm start teaches the words that M is about to say, as M itself predicts them, "
    "then words of the context: the form is taught, not discovered.",
    "facts": "The warm start teaches what the document has stated up to P: statements are taught, "
    "not discovered.",
    "file": "The warm start teaches given explanations: what they say is taught, not discovered.",
    "model": "The warm start teaches descriptions of the context that a language model wrote: what "
    "they say is taught, not discovered.",
}
"""What the report says of the targets, by their kind."""


def _notes(session: Session, measured: dict[str, Evaluated], has_baseline: bool) -> list[str]:
    notes = [_TAUGHT[session.config.target.kind].format(warm=session.config.warm)]
    reader = (
        f"an encoder trained on nothing else ({session.config.baseline.steps} steps)"
        if has_baseline
        else "the lens's own encoder, which has not learnt to"
    )
    notes.append(
        f"last_tokens_…: the true last {session.spec.text_len} source tokens are read by {reader}. "
        "It shows what repeating the recent context would be worth."
    )
    if CONTROL in measured:
        notes.append(
            "The matched-compute control starts from the same warm start and spends the joint "
            "stage's compute on the warm start's own objective. A gain of the joint stage over "
            "the warm start counts only where it also beats this control."
        )
    found = next(iter(measured.values())).metrics
    if "next_only_fve_nrm" in found:
        notes.append(
            f"next_only_…: the words of the context are those of {OTHERS} other rows, and the mean "
            "of the reconstructions counts. context_only_…: the separator and what follows; no "
            "encoder has seen such texts."
        )
    evaluate = session.config.evaluate
    if evaluate.suite == "full":
        notes.append(
            f"The audit encoder started from M and was trained on the targets alone for "
            f"{evaluate.audit_steps} steps, in its own order (seed {evaluate.audit_seed}). "
            "It has never seen the lens's text, but it knows the corpus."
        )
        if "next_tokens_fve_nrm" in found:
            notes.append(
                "next_tokens_…: M's own likeliest next tokens, the first part of the target, are "
                "read by an encoder of their own, with the start, order and steps of the audit "
                "encoder."
            )
        notes.append(
            "Best of K keeps the text whose reconstruction is nearest to the activation. It needs "
            "the activation, so it shows what sampling could reach, not what one text gives."
        )
    if "generator_entropy" in _model_statistics(session.model.folder):
        notes.append(
            "generator_entropy is what the corpus's generator itself spends on its choices, nats "
            "per token; lm_loss is the embedded model's loss on the same held-out documents."
        )
    return notes


def _print_table(session: Session, systems: list[System]) -> None:
    names = (*HEADLINE, "null_shuffle_fve_nrm", "null_shuffle_kl_frac_mean", "top1_agree")
    names += ("claims", "claims_right", "null_shuffle_claims_right", "null_novec_claims_right")
    names += ("support_ece", "support_right_at_90", "support_share_at_90")
    names += ("attribute_stated", "null_shuffle_attribute_stated", "nll_text", "nll_window")
    names += ("text_tokens", "text_cut")
    names += ("next_only_fve_nrm", "context_adds_fve_nrm", "context_adds_kl_frac_mean")
    names += ("next_tokens_fve_nrm", "text_adds_fve_nrm", "text_adds_kl_frac_mean")
    names += ("frozen_fve_nrm", "gap_frozen", "gap_frozen_window", "recall", "precision")
    rows = []
    for name in names:
        values = [system.evaluated.metrics.get(name) for system in systems]
        if all(values):
            rows.append([name, *(f"{v.value:.3f} [{v.lo:.3f}, {v.hi:.3f}]" for v in values)])
    header = ["metric", *(system.name for system in systems)]
    session.console.table("held-out documents, 95 % intervals", header, rows)
