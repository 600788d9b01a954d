"""Many runs of a config: python -m conlens_jax.sweep --config=… --sweep=configs/sweeps/joint.yaml

Trains ``--trials`` runs one after another in ``<run_dir>/sweep/0``, ``1``, …, with the config's
``run_dir``, and prints them sorted, best first; ``<run_dir>/sweep/trials.jsonl`` has the same
table. The same command resumes a stopped sweep. The sweep file has the format of W&B, so
``wandb sweep`` accepts it too.
"""

from __future__ import annotations

import math

from absl import flags

from conlens_jax import cli
from conlens_jax.config import ConfigError
from conlens_jax.files.paths import local_path
from conlens_jax.files.whole import write_whole
from conlens_jax.tracking.console import Console
from conlens_jax.tracking.records import json_line
from conlens_jax.training.loop import train_lens
from conlens_jax.training.preflight import check_files
from conlens_jax.training.session import open_session
from conlens_jax.training.sweep import read_sweep, result_of, trial_config, trials

_CONFIG = cli.define_config()
_SWEEP = flags.DEFINE_string("sweep", None, "Sweep file, such as configs/sweeps/joint.yaml.")
_TRIALS = flags.DEFINE_integer("trials", 0, "Number of runs; 0: the whole grid.", lower_bound=0)
_SEED = flags.DEFINE_integer("sweep_seed", 0, "Seed of a random search.", lower_bound=0)


def main() -> None:
    if not _SWEEP.value:
        raise ConfigError("--sweep is missing; for example --sweep=configs/sweeps/joint.yaml")
    config, sweep = cli.load_config(_CONFIG), read_sweep(_SWEEP.value)
    folder = local_path(config.run_dir) / "sweep"
    # Every trial is checked before the first one starts.
    chosen = trials(sweep, _TRIALS.value, _SEED.value)
    configs = [
        trial_config(config, values, folder / str(number)) for number, values in enumerate(chosen)
    ]
    check_files(configs, trains=True)
    console, results = Console(), []
    for number, (values, trial) in enumerate(zip(chosen, configs, strict=True)):
        console.line("sweep", trial=number, of=len(chosen), **values)
        result = result_of(sweep, train_lens(open_session(trial, console, run=trial.run_dir)))
        results.append({"trial": number, sweep.metric: result, **values})
        lines = "".join(json_line(result) for result in results)
        write_whole(folder / "trials.jsonl", lines)
    sign = -1 if sweep.maximize else 1
    last = lambda value: math.inf if math.isnan(value) else sign * value
    results.sort(key=lambda result: last(result[sweep.metric]))
    console.table("trials, best first", list(results[0]), [list(r.values()) for r in results])


if __name__ == "__main__":
    cli.run(main)
