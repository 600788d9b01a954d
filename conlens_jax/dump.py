"""Corpus → activation cache: python -m conlens_jax.dump --config=configs/quickstart.py"""

from __future__ import annotations

from conlens_jax import cli
from conlens_jax.config import ConfigError
from conlens_jax.data.extract import dump_activations
from conlens_jax.training.console import Console
from conlens_jax.training.setting import open_setting

_CONFIG = cli.define_config()


def main() -> None:
    config = cli.load_config(_CONFIG)
    if config.distributed.coordinator:
        raise ConfigError(
            ["distributed.coordinator: the dump runs in one process, on the devices of one machine"]
        )
    setting = open_setting(config, Console())
    dump_activations(config, setting.model, setting.spec, setting.mesh, setting.console)


if __name__ == "__main__":
    cli.run(main)
