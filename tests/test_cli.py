"""The command line: errors on one screen, configs that build, and the quickstart to its end."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import entry_points
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from pipeline import TINY, child_settings, open_world

from conlens_jax import cli
from conlens_jax.config import (
    ConfigError,
    DistributedConfig,
    ExperimentConfig,
    from_config_dict,
    to_json_dict,
)
from conlens_jax.parallel.host import drop_cut_programs, keep_programs, use_compilation_cache

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/*.py"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """``python -m conlens_jax.<module>`` in the root of the repository."""
    return subprocess.run(
        [sys.executable, "-m", f"conlens_jax.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "WANDB_MODE": "disabled", **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture
def refused(monkeypatch, capsys):
    """The same in this process, of what is refused when flags are parsed."""
    monkeypatch.chdir(ROOT)

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
        code = entry_points.refuse(f"conlens_jax.{module}", arguments)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


def assert_refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 20
    for part in parts:
        assert part in done.stderr, done.stderr


# --- errors -------------------------------------------------------------------------------------


def test_unknown_fields_name_the_nearest():
    done = run(
        "train",
        "--config=configs/quickstart.py",
        "--config.joint.step=3",
        "--config.modle.layer",
        "1",
    )
    assert_refused(
        done,
        "unknown config field 'joint.step'; did you mean 'joint.steps'?",
        "unknown config field 'modle.layer'; did you mean 'model.layer'?",
    )
    assert done.stdout == ""


@pytest.mark.parametrize(
    "argument, message",
    [
        ("joint.steps=many", "joint.steps must be a whole number, not 'many'"),
        ("warm.batch_size=1.5", "warm.batch_size must be a whole number, not '1.5'"),
        ("loss.kl.start=low", "loss.kl.start must be a number, not 'low'"),
        ("lens.dual_path=maybe", "lens.dual_path must be true or false, not 'maybe'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(argument, message, refused):
    done = refused("train", "--config=configs/quickstart.py", f"--config.{argument}")
    assert_refused(done, message)


def test_impossible_values_are_all_named():
    done = run(
        "dump",
        "--config=configs/quickstart.py",
        "--config.dump.min_position=70",
        "--config.model.dtype=float16",
    )
    assert_refused(done, "dump.min_position=70", "model.dtype must be one of float32, bfloat16")


def test_missing_config_is_named():
    assert_refused(run("dump"), "--config is missing", "--config=configs/quickstart.py")
    message = cli._wrong_value("Unknown command line flag 'config.mesh.data'")
    assert message.startswith("--config.mesh.data changes a field of a config file: give --config=")


def test_commands_of_one_process_refuse_several(refused):
    flags_given = (
        "--config.distributed.coordinator=node1:1234",
        "--config.distributed.process_id=1",
    )
    done = refused("explain", "--checkpoint=runs/x", "once upon a time", *flags_given)
    for flag in flags_given:
        assert_refused(done, f"{flag.partition('=')[0]}: this command runs in one process")


def test_evaluate_reads_the_config_of_a_run(tmp_path):
    from conlens_jax.checkpoint_flags import recorded_config

    config = ExperimentConfig(run_dir=str(tmp_path / "run"))
    # The processes that it was trained in are not those that evaluate it.
    trained = dataclasses.replace(config, distributed=DistributedConfig("node1:1234", 4, 0))
    (tmp_path / "run" / "checkpoints" / "7" / "state").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_json_dict(trained)))
    for inside in ("", "checkpoints", "checkpoints/7"):
        assert recorded_config(str(tmp_path / "run" / inside)) == config
    with pytest.raises(ConfigError, match="give a run folder"):
        recorded_config(str(tmp_path))


# --- configs ------------------------------------------------------------------------------------


def page(file: Path):
    """A config file as a module."""
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_builds_and_says_how_it_is_run(file):
    module = page(file)
    config_dict = module.get_config()
    assert config_dict.is_locked
    from_config_dict(config_dict.to_dict())
    assert "Command:" in module.__doc__ and "python -m conlens_jax" in module.__doc__


def test_no_two_configs_share_a_run_folder():
    folders = [page(file).get_config().run_dir for file in CONFIGS]
    assert folders and len(set(folders)) == len(folders)


# --- the whole way ------------------------------------------------------------------------------


def test_quickstart_ends_with_the_path_of_the_report(world, tmp_path):
    """dump, train and evaluate as a user runs them, on one device."""
    folders = {
        "run_dir": tmp_path / "run",
        "dump.cache_dir": tmp_path / "cache",
        "embedded.cache_dir": world.config.embedded.cache_dir,
    }
    small = {f"{stage}.steps": 2 for stage in ("warm", "joint", "control", "baseline")}
    values = {**TINY, "joint.rows_per_document": 2, **small, **folders}
    compiler = {
        name.upper(): str(value)
        for name, value in child_settings().items()
        if name not in ("jax_num_cpu_devices", "jax_numpy_dtype_promotion")
    }
    done = run(
        "quickstart", *(f"--config.{name}={value}" for name, value in values.items()), **compiler
    )
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.splitlines()[-1])
    assert report == (tmp_path / "run" / "report.html").absolute() and report.is_file()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"kl_frac_mean", "warm_kl_frac_mean", "control_kl_frac_mean"} <= metrics.keys()
    assert (tmp_path / "run" / "baseline" / "checkpoints" / "2").is_dir()
    assert (tmp_path / "cache" / "validation" / "metadata.json").is_file()
    assert "devices=1" in done.stderr
    assert metrics["target_next_words_right"] == 1  # explanations in words


def test_compiled_programs_are_kept_where_asked(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    use_compilation_cache("")
    assert {name: getattr(jax.config, name) for name in names} == before
    jax.block_until_ready(jax.jit(lambda x: x + 2)(jnp.arange(5.0)))  # JAX has begun without one
    try:
        use_compilation_cache(str(tmp_path / "programs"), least_seconds=0.0)
        jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) * 3)(jnp.arange(7.0)))
        assert any((tmp_path / "programs").iterdir())
        assert drop_cut_programs(tmp_path / "programs") == []
        keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs"), "as asked"
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("CONLENS_CACHE", str(tmp_path))
        keep_programs()
        assert Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "programs"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize("compression", ["zlib", "zstandard"])
def test_cut_programs_are_removed(tmp_path, compression):
    """A kill or a full disk leaves them; JAX would warn of them at every start."""
    library, content = pytest.importorskip(compression), np.random.default_rng(0).bytes(1000)
    compress = library.compress if compression == "zlib" else library.ZstdCompressor().compress
    whole = compress(content)
    for name, content in (("a", whole), ("b", whole[:-1]), ("c", whole[:500]), ("d", b"")):
        (tmp_path / f"{name}-cache").write_bytes(content)
    (tmp_path / "notes").write_text("mine")
    assert sorted(drop_cut_programs(tmp_path)) == ["b-cache", "c-cache", "d-cache"]
    assert {file.name for file in tmp_path.iterdir()} == {"a-cache", "notes", "looked_through"}
    time.sleep(0.02)
    (tmp_path / "e-cache").write_bytes(whole[:7])
    assert drop_cut_programs(tmp_path) == ["e-cache"]
    assert drop_cut_programs(tmp_path / "not there") == []


def test_entry_points_that_take_a_checkpoint_can_be_imported_together():
    """They share evaluate's flags, and flags are global: no two may have one name."""
    for name in ("evaluate", "explain", "explore"):
        importlib.import_module(f"conlens_jax.{name}")
    importlib.import_module("gradient_report")
