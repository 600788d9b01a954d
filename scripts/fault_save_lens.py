"""Saves a lens as a folder, with every decoder weight changed; used by fault_trials.py.

python -m fault_save_lens <run folder> <lens folder> <number to add>
"""

from __future__ import annotations

import sys

import jax

from conlens_jax.inspection.lens import Lens


def main(run: str, folder: str, add: str) -> None:
    lens = Lens.load(run)
    lens.trainable["decoder"] = jax.tree.map(
        lambda leaf: leaf + float(add), lens.trainable["decoder"]
    )
    lens.save(folder)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"error: {error}")
