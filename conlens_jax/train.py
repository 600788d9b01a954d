"""Activation cache → lens: python -m conlens_jax.train --config=configs/quickstart.py

The same command resumes a stopped run from its last checkpoint. ``--config.launch.dry_run=true``
compiles the steps from shapes alone and prints their memory.
"""

from __future__ import annotations

from conlens_jax import cli
from conlens_jax.planning.command import show_plan
from conlens_jax.training.loop import train_lens
from conlens_jax.training.preflight import check_files
from conlens_jax.training.session import open_session

_CONFIG = cli.define_config()


def main() -> None:
    config = cli.load_config(_CONFIG)
    if config.launch.dry_run:
        show_plan(config, compiled=True)
        return
    console = cli.start(config)
    check_files(config, trains=True)
    folder = train_lens(open_session(config, console, run=config.run_dir))
    console.line("train", run=folder)


if __name__ == "__main__":
    cli.run(main)
