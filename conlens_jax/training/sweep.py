"""Sweeps: many runs that differ in a few fields of the config, compared by one logged metric.

The file has W&B's format (docs.wandb.ai, "Define a sweep configuration") and also works with
``wandb sweep``; here grid and random searches run without W&B.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from conlens_jax.config import (
    ConfigError,
    ExperimentConfig,
    field_names,
    unknown_field_message,
    with_changes,
)
from conlens_jax.config.seeds import numpy_seed
from conlens_jax.files.paths import local_path
from conlens_jax.tracking.records import read_metrics
from conlens_jax.training.stage_log import METRICS

PREFIX = "config."
"""Prefix of a field's name, as on a command line."""

_DISTRIBUTIONS = ("uniform", "log_uniform_values", "int_uniform")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The fields to vary and the metric to compare.

    Attributes:
      method: ``"grid"`` or ``"random"`` (``"bayes"`` only in W&B).
      stage, metric: of the metric to compare, as in ``metrics.jsonl``.
      maximize: whether higher is better.
      parameters: by field name without ``config.``: ``{"value": …}``, ``{"values": […]}``, or
        ``{"min": …, "max": …, "distribution": …}``.
    """

    method: str
    stage: str
    metric: str
    maximize: bool
    parameters: Mapping[str, Mapping[str, Any]]


def read_sweep(file: str | Path) -> Sweep:
    """Reads and checks a sweep file.

    Raises:
      ConfigError: all problems of the file, in one message.
    """
    values = yaml.safe_load(local_path(file).read_text(encoding="utf-8")) or {}
    metric = values.get("metric") or {}
    stage, _, name = str(metric.get("name", "")).partition("/")
    parameters = values.get("parameters") or {}
    problems = []
    if values.get("method") not in ("grid", "random", "bayes"):
        problems.append(f"method must be grid, random or bayes, not {values.get('method')!r}")
    if not name:
        problems.append(
            "metric.name must be <stage>/<name of metrics.jsonl>, such as "
            "joint/validation_kl_at_sampled"
        )
    if metric.get("goal") not in ("minimize", "maximize"):
        problems.append(f"metric.goal must be minimize or maximize, not {metric.get('goal')!r}")
    if not parameters:
        problems.append("parameters is empty")
    known = set(field_names())
    for given, choice in parameters.items():
        field = given.removeprefix(PREFIX)
        if field == given:
            problems.append(f"parameters.{given} must start with {PREFIX!r}, as a flag does")
        elif field not in known:
            problems.append(unknown_field_message(field))
        problems += _choice_problems(given, choice, values.get("method"))
    if problems:
        raise ConfigError([f"{file}: {problem}" for problem in problems])
    fields = {given.removeprefix(PREFIX): choice for given, choice in parameters.items()}
    return Sweep(values["method"], stage, name, metric["goal"] == "maximize", fields)


def _choice_problems(name: str, choice: Any, method: str | None) -> Iterator[str]:
    if not isinstance(choice, Mapping):
        yield f"parameters.{name} must have value, values, or min and max"
    elif "value" in choice or choice.get("values"):
        return
    elif not {"min", "max"} <= set(choice):
        yield f"parameters.{name} must have value, values, or min and max"
    elif method == "grid":
        yield f"parameters.{name}: a grid needs values, not min and max"
    elif _distribution(choice) not in _DISTRIBUTIONS:
        yield f"parameters.{name}.distribution must be one of {', '.join(_DISTRIBUTIONS)}"
    elif not choice["min"] < choice["max"]:
        yield f"parameters.{name}: min must be less than max"
    elif _distribution(choice) == "log_uniform_values" and choice["min"] <= 0:
        yield f"parameters.{name}: log_uniform_values needs a min above 0"


def _distribution(choice: Mapping[str, Any]) -> str:
    """The distribution; W&B's default if the file has none."""
    whole = all(isinstance(choice[end], int) for end in ("min", "max"))
    return choice.get("distribution", "int_uniform" if whole else "uniform")


def trials(sweep: Sweep, count: int, seed: int) -> list[dict[str, Any]]:
    """The values of each trial by field: of a grid all combinations (at most ``count``; 0: all),
    of a random search ``count`` draws, where trial n does not depend on ``count``.

    Raises:
      ConfigError: a bayes search, or a random one without a count.
    """
    if sweep.method == "bayes":
        raise ConfigError("method bayes runs only in W&B; use grid or random")
    if sweep.method == "grid":
        lists = [choice.get("values") or [choice["value"]] for choice in sweep.parameters.values()]
        found = [
            dict(zip(sweep.parameters, values, strict=True)) for values in itertools.product(*lists)
        ]
        return found[: count or None]
    if count < 1:
        raise ConfigError(f"a random search needs --trials of at least 1, not {count}")
    return [
        {
            field: _drawn(choice, np.random.default_rng([numpy_seed(seed), trial, number]))
            for number, (field, choice) in enumerate(sweep.parameters.items())
        }
        for trial in range(count)
    ]


def _drawn(choice: Mapping[str, Any], random: np.random.Generator) -> Any:
    if "value" in choice:
        return choice["value"]
    if choice.get("values"):
        return choice["values"][random.integers(len(choice["values"]))]
    low, high, kind = choice["min"], choice["max"], _distribution(choice)
    if kind == "int_uniform":
        return int(random.integers(low, high + 1))
    if kind == "log_uniform_values":
        return math.exp(random.uniform(math.log(low), math.log(high)))
    return float(random.uniform(low, high))


def trial_config(
    config: ExperimentConfig, values: Mapping[str, Any], folder: Path
) -> ExperimentConfig:
    """The config of one trial, with its own run folder.

    Raises:
      ConfigError: the values do not fit together.
    """
    return with_changes(config, {**values, "run_dir": str(folder)})


def result_of(sweep: Sweep, run_folder: Path) -> float:
    """The last value of the sweep's metric in a run.

    Raises:
      ConfigError: the run never logged it.
    """
    stage_folder = run_folder / sweep.stage
    folder = stage_folder if stage_folder.is_dir() else run_folder  # control, baseline
    records = read_metrics(folder / METRICS)
    found = [r[sweep.metric] for r in records if r["stage"] == sweep.stage and sweep.metric in r]
    if not found:
        names = sorted({name for r in records if r["stage"] == sweep.stage for name in r})
        raise ConfigError(
            f"metric.name: {run_folder} has no {sweep.metric!r} of the {sweep.stage} stage; "
            f"it has {', '.join(names) or 'no such stage'}"
        )
    return math.nan if found[-1] is None else float(found[-1])
