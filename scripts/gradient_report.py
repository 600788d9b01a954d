"""Bias and variance of every gradient estimator.

Command:  python scripts/gradient_report.py
Time:     about a minute on 2 CPU cores.

On a toy whose true gradient is known (``studies/toy_gradients.py``). Prints the table and writes
``gradients.json`` and ``gradients.html`` to ``--out``.

With ``--checkpoint=runs/quickstart`` also for the decoder of a trained lens
(``studies/lens_gradients.py``): ``lens_gradients.json`` and ``lens_gradients.html``. ``--draws``
counts those on the toy, ``--lens_draws`` those on the lens, ``--rows`` the rows of its batch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from absl import flags

from conlens_jax import cli
from conlens_jax.checkpoint_flags import one_checkpoint, recorded_config
from conlens_jax.config import ConfigError
from conlens_jax.evaluation.report.markup import format_interval
from conlens_jax.evaluation.report.report_data import Report
from conlens_jax.evaluation.report.writing import write_report
from conlens_jax.files.paths import local_path, write_problems
from conlens_jax.files.whole import write_whole
from conlens_jax.tracking.console import Console
from conlens_jax.training.preflight import check_files
from conlens_jax.training.run_folder import checkpoint_of
from conlens_jax.training.session import open_session
from studies import lens_gradients
from studies.toy_gradients import build_report, measure

_OUT = flags.DEFINE_string("out", "runs/gradient_report", "Folder for the report.")
_DRAWS = flags.DEFINE_integer("draws", 100_000, "Draws per estimator.", lower_bound=2)
_SEED = flags.DEFINE_integer("toy_seed", 0, "Which toy.")
_LENS_DRAWS = flags.DEFINE_integer(
    "lens_draws", 64, "Draws per estimator on the lens; the reference has 8 times as many.", 2
)
_ROWS = flags.DEFINE_integer("rows", 16, "Rows of the lens's batch.", lower_bound=2)


def main() -> None:
    problems = list(write_problems("--out", _OUT.value))
    if problems:
        raise ConfigError(problems)
    if one_checkpoint():
        check_files(recorded_config(one_checkpoint()), evaluates=one_checkpoint())
    report_toy()
    if one_checkpoint():
        report_lens(one_checkpoint())


def report_toy() -> None:
    found = measure(_DRAWS.value, _SEED.value)
    columns = [field.name for field in dataclasses.fields(next(iter(found.values())))]
    rows = [
        [name, *(f"{value:.3f}" for value in dataclasses.astuple(quality))]
        for name, quality in found.items()
    ]
    Console().table(f"gradient estimators, {_DRAWS.value} draws", ["estimator", *columns], rows)
    numbers = {name: dataclasses.asdict(quality) for name, quality in found.items()}
    _write("gradients", numbers, build_report(found, _DRAWS.value, _SEED.value))


def report_lens(checkpoint: str) -> None:
    console = Console()
    session = open_session(
        recorded_config(checkpoint), console, run=checkpoint_of(checkpoint)[0].parent
    )
    problem = lens_gradients.open_problem(session, checkpoint, _ROWS.value)
    n_draws, n_reference = _LENS_DRAWS.value, 8 * _LENS_DRAWS.value
    found = lens_gradients.measure_lens(problem, n_draws, n_reference)
    columns = list(next(iter(found.values())))
    rows = [[name, *map(_shown, quality.values())] for name, quality in found.items()]
    console.table(f"on {checkpoint}, {n_draws} draws", ["estimator", *columns], rows)
    reference = lens_gradients.REFERENCE
    facts = {
        "model": session.model.model_id,
        "rows": _ROWS.value,
        "draws": n_draws,
        "draws of the reference": f"{n_reference} of {reference.kind}, {reference.samples} samples",
        "lens.history_gradient": session.spec.lens.history_gradient,
    }
    numbers = {
        name: {key: dataclasses.asdict(interval) for key, interval in quality.items()}
        for name, quality in found.items()
    }
    _write("lens_gradients", numbers, lens_gradients.build_lens_report(found, list(facts.items())))


def _shown(interval: lens_gradients.Interval) -> str:
    value, ends = format_interval(interval)
    return f"{value} [{ends}]"


def _write(name: str, numbers: Mapping[str, Any], report: Report) -> None:
    folder = local_path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.json", json.dumps(numbers, indent=2) + "\n")
    print(write_report(report, folder / f"{name}.html").absolute())


if __name__ == "__main__":
    cli.run(main, one_process=True)
