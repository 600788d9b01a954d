"""Makes the embedded model of a config part of the package, so that nobody waits for its training.

Command:  python scripts/ship_embedded.py --config=configs/quickstart.py
Time:     the training of the model: about a minute on 2 CPU cores.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from conlens_jax import cli
from conlens_jax.config import with_changes
from conlens_jax.embedded import language_model

_CONFIG = cli.define_config()


def main() -> None:
    config = cli.load_config(_CONFIG)
    console = cli.start(config)
    with tempfile.TemporaryDirectory() as new:
        anew = with_changes(config, {"embedded.cache_dir": new})
        folder = language_model.ensure_language_model(anew, console, shipped=Path(new))
        file = folder / language_model.STATISTICS_FILE
        statistics = json.loads(file.read_text(encoding="utf-8"))
        statistics["sha256"] = language_model.weights_digest(folder)
        file.write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
        shipped = language_model.SHIPPED / folder.name
        shutil.copytree(folder, shipped, dirs_exist_ok=True)
    print(shipped)


if __name__ == "__main__":
    cli.run(main)
