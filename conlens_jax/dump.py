"""Corpus → activation cache: python -m conlens_jax.dump --config=configs/quickstart.py

The same command resumes an interrupted dump after its last complete shard.
"""

from __future__ import annotations

from conlens_jax import cli
from conlens_jax.data.extract import dump_activations
from conlens_jax.training.preflight import check_files
from conlens_jax.training.session import open_session

_CONFIG = cli.define_config()


def main() -> None:
    config = cli.load_config(_CONFIG)
    console = cli.start(config)
    check_files(config, dumps=True)
    session = open_session(config, console)
    dump_activations(config, session.model, session.spec, session.mesh, session.console)


if __name__ == "__main__":
    cli.run(main)
