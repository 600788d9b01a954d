"""The full suite on the tiny run: what stands in metrics.json, and how its parts hang together."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from pipeline import WARM_STEPS, open_world, quiet_console

from conlens_jax.config import ConfigError
from conlens_jax.corpora.stories import ATTRIBUTES
from conlens_jax.evaluation.run import evaluate_run
from conlens_jax.evaluation.studies.text_changes import CHANGES
from conlens_jax.tracking.records import read_metrics

AUDIT_STEPS, BEST_OF = 12, 3
PREFIXES = ("", "warm_", "control_")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A copy of the world's run, evaluated in full."""
    folder = world.copy_run(tmp_path_factory.mktemp("full") / "run")
    evaluate(world, folder)
    return folder


def evaluate(world, folder, inside="", **changes):
    fields = {"evaluate__suite": "full", "evaluate__audit_steps": AUDIT_STEPS}
    fields |= {"evaluate__best_of": BEST_OF, **changes}
    console, stream = quiet_console()
    session = dataclasses.replace(world.changed(folder, **fields), console=console)
    evaluate_run(session, folder / inside)
    return stream.getvalue()


@pytest.fixture(scope="module")
def metrics(run):
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_lens_is_audited(metrics, prefix):
    of = lambda name: metrics[prefix + name]
    for text in ("", "sampled_"):
        gap = of(f"{text}fve_nrm") - of(f"frozen_{text}fve_nrm")
        assert of(f"{text}gap_frozen") == pytest.approx(gap, abs=1e-6)
        assert of(f"{text}gap_frozen_lo") <= of(f"{text}gap_frozen") <= of(f"{text}gap_frozen_hi")
    gap = of("window_fve_nrm") - of("frozen_window_fve_nrm")
    assert of("gap_frozen_window") == pytest.approx(gap, abs=1e-6)
    for reader in ("", "frozen_"):
        for name in CHANGES:
            if f"{prefix}{name}_rows" in metrics:
                assert f"{prefix}{reader}{name}_retention" in metrics
                assert of(f"{reader}{name}_fve_nrm") is not None
        whole = of(f"{reader}fve_nrm")
        assert of(f"{reader}fve_nrm_at_4") == pytest.approx(whole, abs=1e-5)
        kl_frac = of(f"{reader}kl_frac_mean")
        assert of(f"{reader}kl_frac_mean_at_4") == pytest.approx(kl_frac, abs=1e-4)


def test_the_auditor_is_another_reader(metrics, run):
    """Trained on its own, once, and it has learnt to read."""
    assert metrics["frozen_window_fve_nrm"] != metrics["window_fve_nrm"]
    (folder,) = (run / "audit").iterdir()
    records = read_metrics(folder / "metrics.jsonl")
    assert records[-1]["step"] == AUDIT_STEPS
    assert records[-1]["encoder_error"] < 0.8 * records[0]["encoder_error"]
    assert "decoder_nll" not in records[-1]


def test_a_second_evaluation_takes_up_the_auditor(world, run, metrics):
    """And gives the same numbers to the last bit."""
    before = (run / "metrics.json").read_bytes()
    (folder,) = (run / "audit").iterdir()
    assert f"resumed_from={folder}" in evaluate(world, run)
    assert (run / "metrics.json").read_bytes() == before
    assert len(list((run / "audit").iterdir())) == 1


def test_truth_is_bounded_and_falls_for_other_texts(metrics):
    assert 0 < metrics["probe_read"] <= 1
    for name in ("recall", "sampled_recall", "null_shuffle_recall", "text_only_recall"):
        assert 0 <= metrics[name] <= 1, name
    assert any(f"probe_read_{name}" in metrics for name in ATTRIBUTES)
    # The lens reads block 1 of 3; the controls are the first and the last.
    for layer in (0, 2):
        assert 0 < metrics[f"probe_read_layer_{layer}"] <= 1
        assert metrics[f"window_recall_layer_{layer}"] > 0
    assert "probe_read_layer_1" not in metrics
    assert 0 < metrics["prior_read"] < metrics["probe_read"]
    # The true window holds true words alone: what the story says of itself. The tiny lens's greedy
    # text states nothing, so its precision is not there.
    assert metrics["window_precision"] == 1
    assert metrics["window_recall"] > metrics["null_shuffle_recall"]
    assert 0 < metrics["sampled_precision"] < 1


def test_the_page_shows_the_studies(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    for title in (
        "Side by side",
        "private code",
        "Truth",
        "Interventions",
        "by distance",
        "another layer",
    ):
        assert title in page
    assert "Best of K" in page and "Truncation" in page
    assert page.count('class="hot ') > 20 and "the longest of the held-out rows" in page
    for label in ("least KL", "median KL", "most KL"):
        assert f": {label}</h3>" in page
    for link in ("http://", "https://", "<script", "@import"):
        assert link not in page


def test_best_of_k_only_gains(metrics):
    """In the cosine that it chooses by; its first draw is the sampled text."""
    values = [metrics[f"best_of_{k}_fve_nrm"] for k in (1, 2, BEST_OF)]
    assert values[0] == pytest.approx(metrics["sampled_fve_nrm"], abs=1e-6)
    assert values == sorted(values) and values[0] < values[-1]


def test_baselines_stand_beside_the_lens(metrics):
    names = ("linear_code", "text_only", "hard_prompt", "random_words", "untrained_encoder")
    names += ("logit_lens_words", "tuned_lens_words")
    for name in names:
        for metric in ("fve_nrm", "kl_frac_mean", "top1_agree"):
            assert metrics[f"{name}_{metric}_lo"] <= metrics[f"{name}_{metric}"]
    assert metrics["linear_code_bits"] <= metrics["text_bits"] == 33  # 4 tokens of 320
    assert metrics["linear_code_fve_nrm"] > 0
    # A linear map fitted to M's own last states predicts more like M than the bare head does.
    assert metrics["tuned_lens_kl_at"] < metrics["logit_lens_kl_at"]


def test_parts_of_the_rows_are_all_of_them(metrics):
    for name in ("position", "norm"):
        parts = [metrics[f"{name}_{part}_rows"] for part in ("low", "middle", "high")]
        assert sum(parts) == pytest.approx(1)
    assert metrics["norm_ordinary_rows"] + metrics.get("norm_outlier_rows", 0) == pytest.approx(1)
    if "norm_outlier_rows" not in metrics:
        assert metrics["norm_ordinary_fve_nrm"] == pytest.approx(metrics["fve_nrm"], abs=1e-6)


def test_the_table_for_spreadsheets_says_the_same(metrics, run):
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    for name in ("fve_nrm", "warm_gap_frozen", "kl_frac_mean_minus_control", "lm_loss"):
        assert float(rows[name]["value"]) == metrics[name]
    assert float(rows["gap_frozen"]["lo"]) == metrics["gap_frozen_lo"]
    assert rows["lm_loss"]["lo"] == ""


def test_interventions_alone(world, run, metrics, tmp_path):
    """The same numbers without the rest of the full suite."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "audit")
    evaluate(world, folder, evaluate__suite="interventions")
    alone = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    names = [name for name in alone if name.startswith("intervention_")]
    assert "intervention_shift_minus_third_value" in names
    for name in names:
        assert alone[name] == metrics[name]
    assert "gap_frozen" not in alone and not (folder / "audit").exists()


def test_interventions_need_known_words(world, run):
    with pytest.raises(ConfigError, match="suite='interventions' needs words .* 'stdlib'"):
        evaluate(world, run, evaluate__suite="interventions", corpus__kind="stdlib")


def test_audit_of_unknown_corpus_has_no_truth(world, run, metrics, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    evaluate(world, folder, f"checkpoints/{WARM_STEPS}", corpus__kind="stdlib")
    other = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert other["gap_frozen"] == metrics["warm_gap_frozen"]
    assert not any("recall" in name or "intervention" in name for name in other)
    assert np.isfinite(other["linear_code_fve_nrm"])
