"""Checkpoint → metrics and report: python -m conlens_jax.evaluate --checkpoint=runs/quickstart

``--checkpoint`` is a run folder or one checkpoint in it; ``--step`` selects one of a run folder.
For a run that was moved the recorded model and cache are used, or those that were moved with it;
``--cache_dir`` sets another cache. The configuration is the run's own unless ``--config`` is given;
with ``--config`` alone its ``run_dir`` is evaluated. ``--suite=full`` adds the audit, baselines,
truth, interventions and best of K to the metrics (docs/evaluation.md); ``--suite=interventions``
only the interventions. Several processes need ``--config``, with its fields ``distributed``.
"""

from __future__ import annotations

import dataclasses

from absl import flags

from conlens_jax import cli
from conlens_jax.checkpoint_flags import STEP, one_checkpoint, recorded_config
from conlens_jax.config import ConfigError
from conlens_jax.evaluation.run import evaluate_run
from conlens_jax.files.paths import local_path
from conlens_jax.parallel.processes import is_first
from conlens_jax.training.preflight import check_files
from conlens_jax.training.run_folder import chosen_checkpoint
from conlens_jax.training.session import open_session

_CONFIG = cli.define_config()
SUITE = flags.DEFINE_enum(
    "suite", None, ("basic", "full", "interventions"), "Overrides evaluate.suite."
)
SPLIT = flags.DEFINE_enum("split", None, ("validation", "test"), "Overrides evaluate.split.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Overrides dump.cache_dir.")


def main() -> None:
    if _CONFIG.value is not None:
        config = cli.load_config(_CONFIG)
    elif one_checkpoint():
        config = recorded_config(one_checkpoint())
    else:
        raise ConfigError("give --checkpoint=<run folder> or --config=configs/<file>.py")
    for name, flag in (("suite", SUITE), ("split", SPLIT)):
        if flag.value:
            evaluate = dataclasses.replace(config.evaluate, **{name: flag.value})
            config = dataclasses.replace(config, evaluate=evaluate)
    if _CACHE_DIR.value:
        dump = dataclasses.replace(config.dump, cache_dir=str(local_path(_CACHE_DIR.value)))
        config = dataclasses.replace(config, dump=dump)
    checkpoint, console = one_checkpoint() or config.run_dir, cli.start(config)
    check_files(config, evaluates=checkpoint)
    folder, step = chosen_checkpoint(checkpoint, STEP.value)
    session = open_session(config, console, run=folder.parent)
    report = evaluate_run(session, folder / str(step))
    if is_first():
        print(report)


if __name__ == "__main__":
    cli.run(main)
