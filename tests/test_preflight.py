"""What cannot work is noticed before a model is loaded or trained, all of it in one message."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import entry_points
import pytest
from absl import flags

from conlens_jax import cli
from conlens_jax.config import ConfigError, ExperimentConfig, to_json_dict, with_changes
from conlens_jax.embedded import language_model
from conlens_jax.inspection.lens import Lens
from conlens_jax.tracking.console import Console
from conlens_jax.training import session
from conlens_jax.training.preflight import check_files

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(session, "load_model", fail)
    monkeypatch.setattr(session, "ensure_language_model", fail)
    monkeypatch.setattr(Lens, "load", fail)


def config(tmp_path: Path, **changes) -> ExperimentConfig:
    """Everything under ``tmp_path``; a double underscore stands for the dot of a field."""
    places = {"run_dir": str(tmp_path / "run"), "dump.cache_dir": str(tmp_path / "cache")}
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return with_changes(ExperimentConfig(), {**places, **dotted})


def problems(config: ExperimentConfig, **tasks) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_files(config, **tasks)
    return error.value.problems


def make_run(folder: Path, config: ExperimentConfig) -> Path:
    (folder / "checkpoints" / "7" / "state").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_json_dict(config)))
    return folder


def test_all_of_it_in_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    wrong = config(
        tmp_path,
        run_dir=str(tmp_path / "file" / "run"),
        model__path=str(tmp_path / "model"),
        corpus__kind="text",
        corpus__path=str(tmp_path / "texts"),
        dump__cache_dir=str(tmp_path / "file"),
        train__compile_cache=str(tmp_path / "file" / "programs"),
        train__init_from=str(tmp_path / "earlier"),
    )
    found = problems(wrong, dumps=True, trains=True)
    expected = [
        f"model.path={str(tmp_path / 'model')!r}: there is no such folder",
        f"corpus.path={str(tmp_path / 'texts')!r} does not exist",
        f"dump.cache_dir={str(tmp_path / 'file')!r}: {tmp_path / 'file'} is a file",
        f"run_dir={str(tmp_path / 'file' / 'run')!r}: {tmp_path / 'file'} is a file",
        f"train.init_from={str(tmp_path / 'earlier')!r}: there is no checkpoint",
        f"train.compile_cache={str(tmp_path / 'file' / 'programs')!r}: {tmp_path / 'file'} is",
    ]
    assert len(found) == len(expected)
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(beginning)
    # A lens of the package is a start by its name.
    fine = config(tmp_path, train__init_from="smollm2-135m")
    assert check_files([fine], dumps=True, trains=True) is None
    assert sorted(child.name for child in tmp_path.iterdir()) == ["file"]


def test_hub_ids_streams_and_finished_caches_pass(tmp_path):
    corpus = {"corpus__kind": "huggingface", "corpus__path": "allenai/c4"}
    check_files(config(tmp_path, model__path="openai-community/gpt2", **corpus), dumps=True)
    check_files(config(tmp_path, data__source="stream"), trains=True)
    (text := tmp_path / "a.txt").write_text("some text\n")
    check_files(config(tmp_path, corpus__kind="text", corpus__path=str(text)), dumps=True)
    # Training from a cache does not read the corpus, and a finished cache need not be writable.
    gone = config(tmp_path, corpus__kind="text", corpus__path=str(tmp_path / "gone"))
    for split in ("train", "validation"):
        (tmp_path / "cache" / split).mkdir(parents=True)
    check_files(gone, trains=True)
    assert "does not exist" in problems(gone, dumps=True)[0]
    assert (
        "does not exist"
        in problems(
            config(
                tmp_path,
                **{
                    "data__source": "stream",
                    "corpus__kind": "text",
                    "corpus__path": str(tmp_path / "gone"),
                },
            ),
            trains=True,
        )[0]
    )


def test_caches_runs_and_checkpoints(tmp_path):
    plain = config(tmp_path)
    found = problems(plain, trains=True)
    assert [
        f"there is no {split} cache" in p
        for split, p in zip(("train", "validation"), found, strict=True)
    ] == [True, True]
    run = make_run(tmp_path / "run", plain)
    other = with_changes(plain, {"warm.steps": 3, "data.source": "stream"})
    (data, steps) = problems(other, trains=True)
    assert data.startswith("data.source is 'stream', and was 'cache'")
    assert steps.startswith("warm.steps is 3, and was")
    for split in ("train", "validation"):
        (tmp_path / "cache" / split).mkdir(parents=True)
    check_files(plain, trains=True)
    check_files(plain, evaluates=run)
    (nothing,) = problems(plain, evaluates=tmp_path / "elsewhere")
    assert nothing.startswith(f"--checkpoint={str(tmp_path / 'elsewhere')!r}: there is no check")


def test_a_disk_that_takes_nothing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = problems(config(tmp_path, data__source="stream"), dumps=True, trains=True)
    assert found == [
        f"{name}={str(tmp_path / folder)!r} cannot be written ({tmp_path}: Read-only file system); "
        "choose another"
        for name, folder in (("dump.cache_dir", "cache"), ("run_dir", "run"))
    ]
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(
        language_model, "train_language_model", lambda *_: pytest.fail("a model is trained")
    )
    with pytest.raises(ConfigError, match=r"embedded\.cache_dir=.*Read-only file system"):
        language_model.ensure_language_model(
            config(tmp_path, embedded__cache_dir=str(tmp_path)), Console(enabled=False)
        )


@pytest.mark.parametrize(("kind", "package"), [("parquet", "pyarrow"), ("huggingface", "datasets")])
def test_a_package_that_is_not_there(tmp_path, monkeypatch, kind, package):
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == package else find(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", without)
    (found,) = problems(config(tmp_path, corpus__kind=kind, corpus__path="x/y"), dumps=True)
    assert found == f"corpus.kind={kind!r} needs the package {package}: pip install {package}"


# --- entry points -------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["dump", "train", "quickstart", "evaluate", "sweep"])
def test_entry_points_look_before_they_load(tmp_path, module):
    (tmp_path / "file").write_text("")
    arguments = [
        f"--config={ROOT / 'configs' / 'quickstart.py'}",
        f"--config.model.path={tmp_path / 'model'}",
        f"--config.dump.cache_dir={tmp_path / 'file' / 'cache'}",
        f"--config.run_dir={tmp_path / 'file' / 'run'}",
    ]
    if module == "sweep":
        arguments.append(f"--sweep={ROOT / 'configs' / 'sweeps' / 'joint.yaml'}")
        arguments.append("--trials=2")
    with pytest.raises(ConfigError, match=r"model\.path=.*no such folder") as error:
        entry_points.run(f"conlens_jax.{module}", arguments)
    second = {"dump": "dump.cache_dir=", "quickstart": "dump.cache_dir="}
    second |= {"evaluate": "--checkpoint="}
    assert second.get(module, "run_dir=") in str(error.value)


def test_explain_looks_before_it_loads(tmp_path):
    arguments = [
        *(f"--checkpoint={tmp_path}", "--positions=1,2.5", f"--file={tmp_path / 'none.txt'}"),
        *(f"--html={tmp_path / 'none' / 'page.html'}", "once"),
    ]
    with pytest.raises(ConfigError) as error:
        entry_points.run("conlens_jax.explain", arguments)
    assert [problem.partition("=")[0].split()[0] for problem in error.value.problems] == [
        "--positions",
        "--file",
        "--html",
    ]
    with pytest.raises(ConfigError, match="--html=.* is a folder"):
        entry_points.run("conlens_jax.explain", [arguments[0], f"--html={tmp_path}", "once"])
    with pytest.raises(ConfigError, match="--checkpoint is given 2 times"):
        entry_points.run("conlens_jax.explain", [arguments[0], arguments[0], "once"])
    for wrong in ("--samples=0", "--batch_size=0"):
        with pytest.raises(flags.IllegalFlagValueError, match="positive integer"):
            entry_points.run("conlens_jax.explain", [arguments[0], wrong, "once"])


def test_the_port_is_taken_before_the_lens_is_loaded(tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra 'explore'")
    pytest.importorskip("fastapi", reason="needs the extra 'explore'")
    run = lambda *arguments: entry_points.run(
        "conlens_jax.explore", [f"--checkpoint={tmp_path}", *arguments]
    )
    for port in (99999, -1, 65536):
        with pytest.raises(flags.IllegalFlagValueError, match=r"range \[0, 65535\]"):
            run(f"--port={port}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port={port} is in use on 127.0.0.1"):
            run(f"--port={port}")
    with pytest.raises(ConfigError, match="--host='192.0.2.1' cannot be served"):
        run("--host=192.0.2.1", "--port=0")


@pytest.mark.parametrize("coordinator", ["host:0", "host:65536", "host:99999", "host:x", ":12"])
def test_ports_of_a_coordinator(coordinator):
    values = {"coordinator": coordinator, "num_processes": 2, "process_id": 0}
    with pytest.raises(ConfigError, match="port 1 to 65535"):
        with_changes(ExperimentConfig(), {f"distributed.{k}": v for k, v in values.items()})


# --- help ---------------------------------------------------------------------------------------

SCRIPTS = sorted(
    str(file)
    for file in (ROOT / "scripts").glob("*.py")
    if "argparse" in file.read_text(encoding="utf-8")  # the others are parsed as the modules are
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: Path(path).name)
def test_help_of_scripts(script, capsys):
    with pytest.raises(SystemExit) as left:
        entry_points.run(script, ["--help"])
    assert left.value.code in (0, None) and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "flag", "shown"),
    [("train", "--help", "--config:"), ("explain", "--helpfull", "--positions:")],
)
def test_help_is_no_failure(module, flag, shown):
    """All modules go through cli.run; absl's help can be asked for once a process."""
    command = [sys.executable, "-m", f"conlens_jax.{module}", flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and shown in done.stdout and "--[no]traceback" in done.stdout


def test_what_asks_for_help():
    for flag in ("--help", "-help", "--helpfull", "--helpshort", "--helpxml", "-?", "--help=true"):
        assert cli._HELP.fullmatch(flag)
    for flag in ("--helper", "help", "--config=help"):
        assert not cli._HELP.fullmatch(flag)
