"""Evaluating a run: what stands in metrics.json and in the report, and that it is repeatable."""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import math
import re
import shutil
import types
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from pipeline import CHECKPOINT_EVERY, LAST_STEP, WARM_STEPS, open_world, quiet_console

import gradient_report
from conlens_jax.config import ConfigError
from conlens_jax.data.extract import dump_activations
from conlens_jax.evaluation import run
from conlens_jax.evaluation.claims import Claim
from conlens_jax.evaluation.run import evaluate_run
from conlens_jax.evaluation.suite import HEADLINE
from conlens_jax.evaluation.support import Calibration
from conlens_jax.measurement.metric_files import MEASURED_STEP
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.tracking.records import read_metrics
from conlens_jax.training.checkpoint_storage import CheckpointError
from conlens_jax.training.loop import train_lens
from conlens_jax.training.session import open_caches, training_reference
from studies import lens_gradients

PREFIXES = ("", "warm_", "control_")
# What a run must report, with the ends of its interval, for each of its lenses.
NAMES = (
    *("cos", "fve_nrm", "fve_raw", "kl_at", "kl_cont", "ce_rec", "top1_agree", "kl_floor"),
    *("kl_frac_mean", "kl_frac_zero", "kl_frac_other", "nll_text", "nll_window", "repeat_4gram"),
    *("sampled_cos", "sampled_fve_nrm", "sampled_kl_frac_mean", "last_tokens_fve_nrm"),
    *("null_shuffle_cos", "null_shuffle_fve_nrm", "null_shuffle_kl_frac_mean"),
    *("null_novec_cos", "null_novec_fve_nrm", "null_novec_kl_frac_mean"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(autouse=True)
def _no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@dataclasses.dataclass(frozen=True)
class Result:
    folder: Path
    metrics: dict
    page: str
    printed: str


def evaluate(world, folder: Path, inside: str = "", **changes) -> Result:
    """Evaluates a copy of the world's run, or of one checkpoint in it."""
    if not folder.exists():
        world.copy_run(folder)
    console, stream = quiet_console()
    session = dataclasses.replace(world.changed(folder, **changes), console=console)
    with mock.patch.object(run, "track_evaluation") as track:
        report = evaluate_run(session, folder / inside)
    assert track.call_args.args == (session.config, folder, console)
    assert report == folder / "report.html"
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return Result(folder, metrics, report.read_text(encoding="utf-8"), stream.getvalue())


@pytest.fixture(scope="module")
def result(world, tmp_path_factory):
    return evaluate(world, tmp_path_factory.mktemp("evaluated") / "run")


# --- metrics.json -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_metric_stands_with_its_interval_for_every_lens(result, prefix):
    for name in NAMES:
        low, value, high = (result.metrics[prefix + name + end] for end in ("_lo", "", "_hi"))
        assert low <= value <= high, prefix + name


def test_metrics_are_flat_numbers_or_null(result):
    for name, value in result.metrics.items():
        assert value is None or (isinstance(value, float) and math.isfinite(value)), name
    for name in HEADLINE:
        for other in ("warm", "control"):
            assert result.metrics[f"{name}_minus_{other}_lo"] is not None


def test_metrics_follow_their_definitions(world, result):
    metrics = result.metrics
    train, _ = open_caches(world.session)
    r_squared = training_reference(train).resultant ** 2
    for prefix in (*PREFIXES, "sampled_", "null_shuffle_", "null_novec_"):
        cos, fve = metrics[f"{prefix}cos"], metrics[f"{prefix}fve_nrm"]
        assert fve == pytest.approx(1 - 2 * (1 - cos) / (1 - r_squared), rel=1e-6)
    for reference in ("mean", "zero", "other"):
        expected = 1 - metrics["kl_at"] / metrics[f"kl_{reference}"]
        assert metrics[f"kl_frac_{reference}"] == pytest.approx(expected, rel=1e-6)
    assert abs(metrics["kl_floor"]) < 1e-4 < metrics["kl_at"]
    for name in HEADLINE:
        for other in ("warm", "control"):
            difference = metrics[name] - metrics[f"{other}_{name}"]
            assert metrics[f"{name}_minus_{other}"] == pytest.approx(difference, abs=1e-9)


def test_lenses_are_told_apart_and_references_are_not(result):
    assert len({result.metrics[prefix + "cos"] for prefix in PREFIXES}) == 3
    for name in ("kl_mean", "kl_zero", "kl_other", "kl_floor", "nll_window"):
        assert len({result.metrics[prefix + name] for prefix in PREFIXES}) == 1


def test_language_model_statistics_are_there(world, result):
    recorded = json.loads((world.session.model.folder / "training.json").read_text())
    for name in ("lm_loss", "generator_entropy"):
        assert result.metrics[name] == recorded[name]


class EveryToken:
    """Every token of a text is a claim; even ones are right."""

    reader = types.SimpleNamespace(
        of=lambda tokens: [Claim("next", token, (place,)) for place, token in enumerate(tokens)],
        to_json=dict,
    )

    def is_right(self, claim, row, clean):
        return claim.says % 2 == 0


def test_the_calibration_of_claims_is_kept_with_what_samples_add(world, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "claim_truth", lambda *_: EveryToken())
    found = evaluate(world, tmp_path / "run", evaluate__claim_samples=5)
    kept = Calibration.read(found.folder)
    assert kept.measured[MEASURED_STEP] == LAST_STEP and kept.said_rows == 48
    assert set(kept.agreement) == {4, 5} and kept.said["next"]
    assert {"all", "with_samples"} <= set(kept.measured["reliability"])
    # Texts are sampled for the main lens alone.
    assert found.metrics["support_ece_with_5_samples"] is not None
    assert not any("samples" in name for name in found.metrics if name.startswith("warm_"))
    assert found.metrics["warm_support_ece"] is not None
    assert found.metrics["null_novec_claims"] == world.config.lens.text_len
    assert "Support and truth" in found.page and "all claims, with 5 samples" in found.page


def test_evaluation_is_deterministic(world, result):
    before = (result.folder / "metrics.json").read_bytes()
    again = evaluate(world, result.folder)
    assert (result.folder / "metrics.json").read_bytes() == before
    assert again.page == result.page


def test_baseline_encoder_reads_the_last_tokens(world, tmp_path):
    """With a baseline it is no longer the lens's own encoder that reads the true last tokens."""
    session = world.changed(
        tmp_path / "run", baseline__steps=20, baseline__batch_size=16, joint__steps=0
    )
    run = train_lens(session)
    records = read_metrics(run / "baseline" / "metrics.jsonl")
    assert records[-1]["step"] == 20 and "decoder_nll" not in records[-1]
    # Far below 2, what a direction at random would give: a clone of M reads its own source.
    assert records[-1]["encoder_error"] < 0.5
    evaluate_run(session, run)
    with_baseline = json.loads((run / "metrics.json").read_text())
    shutil.rmtree(run / "baseline")
    evaluate_run(session, run)
    without = json.loads((run / "metrics.json").read_text())
    differing = {name for name in without if without[name] != with_baseline[name]}
    assert "last_tokens_fve_nrm" in differing
    assert all(name.startswith("last_tokens_") for name in differing)


# --- report.html --------------------------------------------------------------------------------


def test_report_is_self_contained(result):
    assert result.page.lstrip().lower().startswith("<!doctype html>")
    for link in ("http://", "https://", "<script", "@import"):
        assert link not in result.page
    assert not re.search(r"""(src|href)\s*=\s*["']?[/.]""", result.page)


def test_report_shows_lenses_metrics_curves_and_settings(world, result):
    for text in ("warm start", "joint training", "matched-compute control", "fve_nrm"):
        assert text in result.page
    assert result.page.count("<svg") >= 4
    assert world.session.model.model_id in result.page
    assert f"step {LAST_STEP}" in result.page
    # With a minus sign, as all numbers of the page.
    assert f"{result.metrics['kl_frac_mean']:.2f}".replace("-", "−") in result.page
    assert result.page.count("Control: text of another row") == world.config.evaluate.n_examples


def test_console_has_a_table_of_all_lenses(result):
    assert "held-out documents, 95 % intervals" in result.printed
    line = next(line for line in result.printed.splitlines() if line.strip().startswith("fve_nrm"))
    for prefix in PREFIXES:
        assert f"{result.metrics[prefix + 'fve_nrm']:.3f}" in line


def test_one_checkpoint_of_a_run_and_escaped_texts(world, tmp_path, monkeypatch):
    """A token may hold anything, so no text may become markup."""
    decode = Tokenizer.decode
    monkeypatch.setattr(
        Tokenizer, "decode", lambda self, ids: f"<b onclick='x'>{decode(self, ids)}</b> & so"
    )
    step = LAST_STEP - CHECKPOINT_EVERY
    found = evaluate(world, tmp_path / "run", f"checkpoints/{step}", evaluate__rows=32)
    assert f"step {step}" in found.page and "32 rows" in found.page
    assert "<b onclick" not in found.page
    first = open_caches(world.session)[1].rows([0])
    context = decode(world.session.model.tokenizer, first.tokens_NS[0, : int(first.positions_N[0])])
    escaped = html.escape(f"<b onclick='x'>{context}</b> & so")
    plain_quotes = lambda text: re.sub("&(#x27|#39|apos);", "'", text)
    assert plain_quotes(escaped) in plain_quotes(found.page)


def test_warm_checkpoint_alone(world, result, tmp_path):
    """Of a run that ended with its warm start, and the same lens as inside the whole run."""
    run = world.copy_run(tmp_path / "run")
    for step in (LAST_STEP, LAST_STEP - CHECKPOINT_EVERY):
        shutil.rmtree(run / "checkpoints" / str(step))
    shutil.rmtree(run / "control")
    found = evaluate(world, run)
    assert f"step {WARM_STEPS}" in found.page
    assert not any("_minus_" in name or name.startswith(PREFIXES[1:]) for name in found.metrics)
    for name in NAMES:
        assert found.metrics[name] == result.metrics[f"warm_{name}"], name


def test_all_rows_where_none_are_counted(world, result, tmp_path):
    """``evaluate.rows = 0``; more rows move the numbers."""
    found = evaluate(world, tmp_path / "run", f"checkpoints/{WARM_STEPS}", evaluate__rows=0)
    assert "64 rows" in found.page
    assert found.metrics["cos"] != result.metrics["warm_cos"]


def test_test_split(world, result, tmp_path):
    """Its own rows; asked for before there are any, the message says how to make them."""
    cache = tmp_path / "cache"
    shutil.copytree(world.cache, cache)
    inside = f"checkpoints/{WARM_STEPS}"
    changes = {"dump__cache_dir": str(cache), "evaluate__split": "test"}
    with pytest.raises(ConfigError, match="there is no test cache.*dump.n_test_samples"):
        evaluate(world, tmp_path / "run", inside, **changes)
    session = world.changed(tmp_path / "dump", **changes, dump__n_test_samples=16)
    dump_activations(session.config, session.model, session.spec, session.mesh, quiet_console()[0])
    calibration = Calibration({}, {"next": ((0.1, 0.2), (0.9, 0.8))}, {MEASURED_STEP: 1})
    calibration.write(tmp_path / "run")
    found = evaluate(world, tmp_path / "run", inside, **changes)
    # What the validation documents gave stays.
    assert Calibration.read(tmp_path / "run") == calibration
    assert "16 rows of" in found.page and "held-out documents (test)" in found.page
    assert found.metrics["cos"] != result.metrics["warm_cos"]


# --- what does not fit --------------------------------------------------------------------------


def test_checkpoint_of_another_model(world):
    other = dataclasses.replace(world.session.model, weights_hash="f00", model_id="other/model")
    session = dataclasses.replace(world.session, model=other)
    with pytest.raises(ConfigError, match="model.path: the checkpoint .* other/model") as caught:
        evaluate_run(session, world.run)
    assert world.session.model.model_id in str(caught.value)


def test_folder_without_a_checkpoint(world, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        evaluate_run(world.session, tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        evaluate_run(world.session, world.run / "checkpoints" / "77")


def test_lens_of_another_shape(world, tmp_path):
    session = world.changed(tmp_path / "run", lens__encoder_prompt="the <text>")
    with pytest.raises(CheckpointError, match="soft_prompt"):
        evaluate_run(session, world.run)


def test_gradient_report_of_a_lens_from_the_command_line(world, tmp_path, monkeypatch):
    """The flags reach the run, and the page its numbers; the reference's estimator is enough."""
    few = [case for case in lens_gradients.CASES if case[0] == "RLOO 4"]
    measure = functools.partial(lens_gradients.measure_lens, cases=few)
    monkeypatch.setattr(lens_gradients, "measure_lens", measure)
    run = world.copy_run(tmp_path / "run")
    flags.FLAGS(
        ["gradient_report", f"--checkpoint={run}", f"--out={tmp_path}", "--draws=20"]
        + ["--lens_draws=2", "--rows=8"]
    )
    gradient_report.main()
    found = json.loads((tmp_path / "lens_gradients.json").read_text(encoding="utf-8"))
    assert found.keys() == {"RLOO 4"}
    assert math.isfinite(found["RLOO 4"]["snr"]["value"])
    assert "RLOO 4" in (tmp_path / "lens_gradients.html").read_text(encoding="utf-8")
