"""Bias and variance of every gradient estimator: python -m conlens_jax.gradient_report

On a toy whose true gradient is known (see :mod:`conlens_jax.evaluation.gradients`). Prints the
table and writes ``gradients.json`` and ``gradients.html`` to ``--out``. About a minute.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from absl import flags

from conlens_jax import cli
from conlens_jax.evaluation.gradients import build_report, measure
from conlens_jax.evaluation.report import write_report
from conlens_jax.training.console import Console

_OUT = flags.DEFINE_string("out", "runs/gradient_report", "Folder for the report.")
_DRAWS = flags.DEFINE_integer("draws", 100_000, "Draws an estimator.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Which toy.")


def main() -> None:
    found = measure(_DRAWS.value, _SEED.value)
    columns = [field.name for field in dataclasses.fields(next(iter(found.values())))]
    rows = [
        [name, *(f"{value:.3f}" for value in dataclasses.astuple(quality))]
        for name, quality in found.items()
    ]
    Console().table(f"gradient estimators, {_DRAWS.value} draws", ["estimator", *columns], rows)
    folder = Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {name: dataclasses.asdict(quality) for name, quality in found.items()}
    (folder / "gradients.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    report = build_report(found, _DRAWS.value, _SEED.value)
    print(write_report(report, folder / "gradients.html").absolute())


if __name__ == "__main__":
    cli.run(main)
