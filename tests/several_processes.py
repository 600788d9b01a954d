"""What test_processes.py runs in each of several processes: a dump and an evaluation, once, and a
training that is slow enough to be stopped in its midst."""

from __future__ import annotations

import time
from pathlib import Path

from conlens_jax import cli
from conlens_jax.data.extract import dump_activations
from conlens_jax.evaluation.run import evaluate_run
from conlens_jax.training import loop, stage_loop
from conlens_jax.training.session import open_session
from conlens_jax.training.validation import Validation

_CONFIG = cli.define_config()


def _wait(*_) -> Validation:
    time.sleep(1.5)
    return Validation({}, "")


def main() -> None:
    config = cli.load_config(_CONFIG)
    console = cli.start(config)
    session, run = open_session(config, console), Path(config.run_dir)
    dump_activations(config, session.model, session.spec, session.mesh, console)
    if not (run / "report.html").exists():
        evaluate_run(session, run)
    stage_loop.validate = _wait
    loop.train_lens(session)


if __name__ == "__main__":
    cli.run(main)
