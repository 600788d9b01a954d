"""The console, the metrics file, and Weights & Biases as a guest that may fail."""

from __future__ import annotations

import builtins
import io
import json
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from conlens_jax.config import WandbConfig
from conlens_jax.tracking.console import Console, format_value
from conlens_jax.tracking.records import MetricsFile, read_metrics
from conlens_jax.tracking.wandb_run import WandbRun
from conlens_jax.training.stage_log import BINS, StageLog, histogram
from conlens_jax.training.validation import Sample, token_shares

# --- console ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.235"),
        (123456.0, "1.235e+05"),
        (0.0, "0"),
        (float("nan"), "nan"),
        (123456, "123456"),
        (np.float32(0.5), "0.5"),
        (jnp.int32(7), "7"),
        (True, "true"),
        (None, "none"),
        ("warm", "warm"),
        ("two words", '"two words"'),
        ("", '""'),
    ],
)
def test_format_value(value, text):
    assert format_value(value) == text


def test_lines_are_structured_and_aligned():
    stream = io.StringIO()
    console = Console(stream)
    console.line("joint", step=120, loss=1.23456)
    console.line("checkpoint", step=120, folder="a b")
    first, second = stream.getvalue().splitlines()
    assert first[8:] == " joint      step=120 loss=1.235"
    assert second[8:] == ' checkpoint step=120 folder="a b"'
    assert [len(part) for part in first[:8].split(":")] == [2, 2, 2]


def test_plain_progress_gives_lines_at_intervals_and_a_last_one():
    stream = io.StringIO()
    with Console(stream, seconds_between_lines=0).progress(10, "warm", initial=4) as progress:
        progress.update(2, loss=3.0, kl=1.0)
        progress.update(loss=2.0)
        progress.update(3)
    lines = [line[9:] for line in stream.getvalue().splitlines()]
    assert lines[0].startswith("warm       done=6/10 left=") and lines[0].endswith("loss=3 kl=1")
    assert lines[1].startswith("warm       done=7/10 left=") and lines[1].endswith("loss=2 kl=1")
    assert lines[2].startswith("warm       done=10/10 took=0:00") and len(lines) == 3
    quiet = io.StringIO()
    with Console(quiet, seconds_between_lines=1000).progress(10, "warm") as progress:
        progress.update(9)
    assert len(quiet.getvalue().splitlines()) == 1


def test_a_line_under_a_live_bar_stands_on_a_row_of_its_own():
    stream = io.StringIO()
    console = Console(stream, interactive=True)
    with console.progress(10, "joint") as progress:
        progress.update(5, loss=0.25)
        progress._bar.refresh()
        console.line("validate", kl=0.5)
    text = stream.getvalue()
    assert "joint:  50%" in text and "loss=0.25" in text
    # The text right before the line clears the bar's row: a terminal shows the last carriage.
    line = next(row for row in text.split("\n") if "validate" in row)
    before = line.split("\r")[-2]
    assert line.split("\r")[-1].endswith("validate   kl=0.5") and before.strip() == ""


def test_table_and_block():
    stream = io.StringIO()
    console = Console(stream)
    console.table("Losses", ["name", "value"], [["kl", 0.5], ["two\nlines", 12.25]])
    console.block("sample 1", "left text\n  the end")
    assert stream.getvalue().splitlines() == [
        "Losses",
        "  name        value",
        "  ──────────  ─────",
        "  kl            0.5",
        "  two\\nlines  12.25",
        "── sample 1 ──",
        "  left text",
        "    the end",
    ]


def test_a_disabled_console_is_silent():
    stream = io.StringIO()
    console = Console(stream, interactive=True, enabled=False)
    console.line("joint", step=1)
    console.table("t", ["a"], [[1]])
    console.block("b", "text")
    with console.progress(2, "joint") as progress:
        progress.update(2, loss=1.0)
    assert stream.getvalue() == ""


# --- metrics file -------------------------------------------------------------------------------


def test_records_are_on_disk_at_once_and_nan_is_null(tmp_path):
    metrics = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    metrics.write(1, stage="warm", loss=jnp.float32(0.5), bad=float("nan"), n=np.int64(3))
    (record,) = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert record.pop("time") > 1e9
    assert record == {"step": 1, "stage": "warm", "loss": 0.5, "bad": None, "n": 3}
    metrics.write(2, values=[np.float32("inf"), 1.0], text="é", flag=True)
    second = read_metrics(metrics.path)[1]
    assert (second["values"], second["text"], second["flag"]) == ([None, 1.0], "é", True)


def test_resume_drops_later_records_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in range(1, 6):
        metrics.write(step, loss=float(step))
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]

    resumed = MetricsFile(path)
    resumed.truncate_after(3)
    resumed.write(4, loss=40.0)
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_does_not_swallow_the_next_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsFile(path).write(2, loss=1.0)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        MetricsFile(path).truncate_after(1)


def test_a_full_disk_names_the_file_and_its_folder(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left.*metrics\.jsonl.*{tmp_path}.*make room"):
        MetricsFile(tmp_path / "metrics.jsonl").write(1, loss=1.0)


def test_other_processes_write_nothing(tmp_path):
    metrics = MetricsFile(tmp_path / "run" / "metrics.jsonl", enabled=False)
    metrics.write(1, loss=1.0)
    metrics.truncate_after(0)
    assert not metrics.path.parent.exists()


# --- wandb --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


class FakeRun:
    def __init__(self, fail_at: int | None = None):
        self.logged, self.finished, self.fail_at = [], False, fail_at
        self.id, self.summary, self.artifacts = "abc", {}, []

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, values):
        if len(self.logged) == self.fail_at:
            raise OSError("no space left on device")
        self.logged.append(values)

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self):
        self.finished = True


class FakeArtifact:
    def __init__(self, name, type):
        self.name, self.type, self.files = name, type, []

    def add_file(self, path):
        self.files.append(path)


def fake_wandb(monkeypatch, run, api_key="key"):
    calls = []

    def init(**arguments):
        calls.append(arguments)
        if isinstance(run, Exception):
            raise run
        return run

    module = types.SimpleNamespace(
        init=init,
        Settings=dict,
        Table=lambda columns, data: (columns, data),
        Histogram=lambda np_histogram: np_histogram,
        Artifact=FakeArtifact,
        api=types.SimpleNamespace(api_key=api_key),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def start(tmp_path, mode, **arguments):
    stream = io.StringIO()
    run = WandbRun(
        WandbConfig(mode=mode), tmp_path, {"seed": 1}, console=Console(stream), **arguments
    )
    return run, stream


def test_metrics_and_tables_reach_wandb_with_their_step(tmp_path, monkeypatch):
    inner = FakeRun()
    fake_wandb(monkeypatch, inner)
    run, stream = start(tmp_path, "offline")
    run.log({"loss": 1.0}, 7)
    run.table("samples", ("text",), [("a",)], 8)
    run.finish()
    assert inner.logged == [{"loss": 1.0, "step": 7}, {"samples": (["text"], [["a"]]), "step": 8}]
    assert inner.finished and not run.active and stream.getvalue() == ""


def test_the_end_of_a_run_does_not_wait_for_a_network_for_ever(tmp_path, monkeypatch):
    """Only where this version of wandb knows the setting: an unknown one is an error of its own."""
    calls = fake_wandb(monkeypatch, FakeRun())
    start(tmp_path, "online")
    assert "finish_timeout" not in calls[0]["settings"]
    real = type("Settings", (dict,), {"model_fields": {"finish_timeout": None}})
    monkeypatch.setattr(sys.modules["wandb"], "Settings", real)
    start(tmp_path, "online")
    assert 0 < calls[1]["settings"]["finish_timeout"] <= 600


def test_the_run_id_is_stable_and_the_environment_wins(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch, FakeRun())
    start(tmp_path, "offline")
    monkeypatch.setenv("WANDB_MODE", "online")
    start(tmp_path, "disabled")
    start(tmp_path / "other", "offline")
    first, second, third = calls
    assert first["id"] == second["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert third["id"] != first["id"]
    assert (first["mode"], second["mode"]) == ("offline", "online")
    assert (first["resume"], second["resume"]) == (None, "allow")
    assert first["dir"] == str(tmp_path) and first["config"] == {"seed": 1}


def test_the_agent_of_a_sweep_names_the_run(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch, FakeRun())
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    start(tmp_path, "offline")
    monkeypatch.delenv("WANDB_RUN_ID")
    start(tmp_path, "offline")  # the evaluation, later
    assert [call["id"] for call in calls] == ["trial7", "trial7"]


@pytest.mark.parametrize("way", ["config", "environment", "other process"])
def test_disabled_never_imports_wandb(tmp_path, monkeypatch, way):
    real_import = builtins.__import__

    def guarded(name, *arguments, **keywords):
        assert name != "wandb"
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", guarded)
    if way == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    mode = "disabled" if way == "config" else "offline"
    run, stream = start(tmp_path, mode, enabled=way != "other process")
    run.log({"loss": 1.0}, 1)
    run.table("samples", ["text"], [["a"]], 1)
    run.histogram("cos", [1], [0.0, 1.0], 1)
    run.summary({"cos": 1.0})
    run.artifact("evaluation", [tmp_path / "report.html"])
    run.finish()
    # The guard's AssertionError would have been caught and said here.
    assert stream.getvalue() == "" and not run.active
    assert not (tmp_path / "wandb_id.txt").exists()


@pytest.mark.parametrize(
    ("failure", "mode", "message"),
    [
        ("not installed", "offline", "wandb"),
        ("not logged in", "online", "wandb login"),
        ("no network", "online", "timed out"),
        ("disk full", "offline", "no space left"),
    ],
)
def test_a_failure_is_one_warning_and_the_training_goes_on(
    tmp_path, monkeypatch, failure, mode, message
):
    if failure == "not installed":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif failure == "not logged in":
        fake_wandb(monkeypatch, FakeRun(), api_key=None)
    elif failure == "no network":
        fake_wandb(monkeypatch, TimeoutError("timed out"))
    else:
        fake_wandb(monkeypatch, FakeRun(fail_at=1))
    run, stream = start(tmp_path, mode)
    for step in range(3):
        run.log({"loss": 1.0}, step)
    run.table("samples", ["text"], [["a"]], 3)
    run.finish()
    (line,) = stream.getvalue().splitlines()
    assert "tracking is off" in line and message in line


def test_an_offline_run_is_really_written(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    run, stream = start(tmp_path, "offline")
    assert run.active
    for step in (1, 2, 1):
        run.log({"loss": 0.5 * step}, step)
    run.table("samples", ["text", "kl"], [["a b c", 0.5]], 2)
    run.histogram("cos", *histogram("cos", np.linspace(0, 1, 9)), 2)
    run.summary({"evaluation/cos": 0.25})
    (tmp_path / "report.html").write_text("<p>the report</p>")
    run.artifact("evaluation", [tmp_path / "report.html"])
    run.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (data,) = folder.glob("*.wandb")
    assert data.stem == "run-" + (tmp_path / "wandb_id.txt").read_text().strip()
    # wandb's own process may flush a moment after finish() has returned.
    deadline = time.monotonic() + 10
    while b"samples" not in data.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    written = data.read_bytes()
    assert b"loss" in written and b"samples" in written and b"histogram" in written
    assert b"evaluation/cos" in written and b"report.html" in written
    assert stream.getvalue() == ""
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# --- both ---------------------------------------------------------------------------------------

SAMPLE = Sample("a fox", "ran", "fox ran", 0.5, 0.25, "ran 0.90", "ran 0.70")


def test_a_stage_writes_its_numbers_samples_and_histograms_twice(tmp_path, monkeypatch):
    inner = FakeRun()
    fake_wandb(monkeypatch, inner)
    tracker, stream = start(tmp_path, "offline")
    log = StageLog(tmp_path, "joint", tracker)
    log.numbers(3, {"loss": 1.5})
    log.samples(3, [SAMPLE, SAMPLE])
    cos = np.array([-1.0, 0.1, 0.9, 1.0, np.nan])
    log.distributions(3, {"cos_sampled": cos, "kl_at_sampled": cos + 1}, [("fox", 0.25)])
    (numbers,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (numbers["step"], numbers["stage"], numbers["loss"]) == (3, "joint", 1.5)
    samples = read_metrics(tmp_path / "samples.jsonl")
    assert len(samples) == 2 and samples[1]["explanation"] == "fox ran" and samples[1]["kl"] == 0.25
    (record,) = read_metrics(tmp_path / "histograms.jsonl")
    assert record["token_shares"] == {"fox": 0.25}
    counts, edges = record["cos_sampled"]["counts"], record["cos_sampled"]["edges"]
    assert (len(counts), len(edges), sum(counts)) == (BINS, BINS + 1, 4)
    assert (edges[0], edges[-1]) == (-1.0, 1.0)  # so that two steps lie over each other
    assert record["kl_at_sampled"]["edges"][-1] == 2.0
    logged = {name: value for entry in inner.logged for name, value in entry.items()}
    assert all(entry["step"] == 3 for entry in inner.logged)
    assert logged["joint/loss"] == 1.5 and logged["joint/tokens"][1] == [["fox", 0.25]]
    columns, rows = logged["joint/samples"]
    assert columns[:3] == ["context", "continuation", "explanation"] and rows[0][2] == "fox ran"
    assert logged["joint/cos_sampled"][0].tolist() == counts
    log.truncate_after(2)
    for name in ("metrics", "samples", "histograms"):
        assert read_metrics(tmp_path / f"{name}.jsonl") == []
    assert stream.getvalue() == ""


def test_shares_of_tokens_are_counted():
    tokenizer = types.SimpleNamespace(token=lambda token: f"t{token}")
    texts_NT = np.array([[1, 1, 2], [1, 3, 2]])
    assert token_shares(texts_NT, tokenizer, 2) == [("t1", 0.5), ("t2", pytest.approx(1 / 3))]


def test_the_evaluation_goes_into_the_run_that_was_trained(tmp_path, monkeypatch):
    from conlens_jax.config import ExperimentConfig
    from conlens_jax.evaluation.tracking import FILES, track_evaluation

    inner = FakeRun()
    calls = fake_wandb(monkeypatch, inner)
    start(tmp_path, "offline")[0].finish()  # training
    for name in FILES:
        (tmp_path / name).write_text("{}")
    (tmp_path / "metrics.json").write_text('{"kl_frac_mean": 0.5, "kl_frac_mean_lo": null}')
    console = Console(io.StringIO())
    track_evaluation(ExperimentConfig(), tmp_path, console)
    trained, evaluated = calls
    assert trained["id"] == evaluated["id"] and evaluated["config"] == {} and inner.finished
    expected = {"evaluation/kl_frac_mean": 0.5, "evaluation/kl_frac_mean_lo": None}
    assert inner.summary == expected
    (artifact,) = inner.artifacts
    assert (artifact.name, artifact.type) == ("evaluation-abc", "evaluation")
    assert artifact.files == [str(tmp_path / name) for name in FILES]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track_evaluation(ExperimentConfig(), tmp_path, console)
    assert len(calls) == 2
