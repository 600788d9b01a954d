"""Sweeps: their files, their draws, and how runs are judged."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from entry_points import check
from pipeline import JOINT_STEPS

from conlens_jax.config import ConfigError, ExperimentConfig, JointConfig
from conlens_jax.training.sweep import read_sweep, result_of, trial_config, trials

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
RANDOM = {
    "method": "random",
    "metric": {"name": "joint/kl", "goal": "minimize"},
    "parameters": {
        "config.joint.steps": {"min": 2, "max": 4},
        "config.loss.kl.start": {"min": 1e-3, "max": 1e1, "distribution": "log_uniform_values"},
        "config.loss.mse.start": {"min": 0.5, "max": 1.0},
        "config.lens.estimator": {"values": ["reinmax", "rloo"]},
        "config.warm.steps": {"value": 0},
    },
}


def written(folder: Path, **changes) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({**RANDOM, **changes}))
    return file


# --- the files of the repository ----------------------------------------------------------------


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_sweep_makes_configs_that_train(file, monkeypatch):
    """By our own draws, and by the command that W&B's agent makes of the file."""
    monkeypatch.chdir(ROOT)
    sweep, values = read_sweep(file), yaml.safe_load(file.read_text())
    chosen = trials(sweep, 3, 0)
    for trial in chosen:
        # What wandb's agent puts in the place of ${args}, and runs.
        flags = [f"--config.{field}={value}" for field, value in trial.items()]
        before = values["command"]
        assert before[-1] == "${args}" and "$" not in "".join(before[:2])
        script = before[2].replace("exec python -m conlens_jax.train", "printf '%s\\n'")
        done = subprocess.run(
            [*before[:2], script, before[3], *flags],
            env={"WANDB_RUN_ID": "abc", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        config = check(values["program"], done.stdout.splitlines())
        assert config.run_dir.endswith("/abc") and config.joint.steps
        assert config == trial_config(config, trial, Path(config.run_dir))


def test_the_metric_is_one_that_training_logs(tmp_path):
    """Of the names in validation's own source: the stage that it names writes text."""
    from conlens_jax.training import validation

    source = Path(validation.__file__).read_text()
    for file in SWEEPS:
        sweep = read_sweep(file)
        assert sweep.stage in ("joint", "control", "warm")
        name = sweep.metric.removeprefix("validation_")
        assert name != sweep.metric and f'scores["{name}"]' in source


# --- reading and drawing ------------------------------------------------------------------------


def test_draws_stay_in_their_ranges_and_do_not_depend_on_the_count(tmp_path):
    sweep = read_sweep(written(tmp_path))
    found = trials(sweep, 200, seed=1)
    assert found[:5] == trials(sweep, 5, seed=1) != trials(sweep, 5, seed=2)
    of = lambda name: [trial[name] for trial in found]
    assert set(of("joint.steps")) == {2, 3, 4}
    assert set(of("lens.estimator")) == {"reinmax", "rloo"} and set(of("warm.steps")) == {0}
    assert all(0.5 <= value <= 1 for value in of("loss.mse.start"))
    # Uniform in the logarithm: half of the draws below the geometric mean.
    assert all(1e-3 <= value <= 10 for value in of("loss.kl.start"))
    assert 70 <= sum(value < 0.1 for value in of("loss.kl.start")) <= 130
    config = trial_config(ExperimentConfig(), found[0], tmp_path / "0")
    assert config.run_dir == str(tmp_path / "0") and config.loss.kl.start == of("loss.kl.start")[0]


def test_a_grid_holds_every_combination(tmp_path):
    parameters = {
        "config.loss.kl.start": {"values": [0.1, 0.2]},
        "config.loss.mse.start": {"values": [1.0, 2.0, 3.0]},
        "config.warm.steps": {"value": 0},
    }
    sweep = read_sweep(written(tmp_path, method="grid", parameters=parameters))
    found = trials(sweep, 0, 0)
    assert len(found) == len({tuple(trial.values()) for trial in found}) == 6
    assert trials(sweep, 2, 0) == found[:2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "best"}, "method must be grid, random or bayes"),
        ({"metric": {"name": "kl", "goal": "low"}}, "metric.name must be(.|\n)*metric.goal must"),
        ({"parameters": {}}, "parameters is empty"),
        ({"parameters": {"config.loss.k.start": {"value": 1}}}, "unknown config field 'loss.k"),
        ({"parameters": {"loss.kl.start": {"value": 1}}}, "must start with 'config.'"),
        ({"parameters": {"config.loss.kl.start": {"min": 1}}}, "value, values, or min and max"),
        ({"parameters": {"config.loss.kl.start": {"min": 2, "max": 1}}}, "less than max"),
        (
            {"method": "grid", "parameters": {"config.loss.kl.start": {"min": 1, "max": 2}}},
            "a grid needs values",
        ),
    ],
)
def test_what_cannot_be_run_is_said(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_sweep(written(tmp_path, **changes))


def test_searches_that_do_not_run_here(tmp_path):
    with pytest.raises(ConfigError, match="bayes runs only in W&B"):
        trials(read_sweep(written(tmp_path, method="bayes")), 3, 0)
    with pytest.raises(ConfigError, match="--trials of at least 1"):
        trials(read_sweep(written(tmp_path)), 0, 0)
    values = {"joint.batch_size": 0}
    with pytest.raises(ConfigError, match="joint.batch_size"):
        trial_config(ExperimentConfig(joint=JointConfig(steps=JOINT_STEPS)), values, tmp_path)


def test_the_last_value_counts(tmp_path):
    records = [{"stage": "warm", "kl": 9}, {"stage": "joint", "kl": 2}, {"stage": "joint", "kl": 1}]
    lines = "".join(json.dumps({"step": n, **r}) + "\n" for n, r in enumerate(records))
    (tmp_path / "metrics.jsonl").write_text(lines)
    sweep = read_sweep(written(tmp_path))
    assert result_of(sweep, tmp_path) == 1.0
    other = read_sweep(written(tmp_path, metric={"name": "joint/kls", "goal": "maximize"}))
    with pytest.raises(ConfigError, match="no 'kls' of the joint stage; it has kl, stage, step"):
        result_of(other, tmp_path)
