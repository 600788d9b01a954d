"""Stores what a lens says of five texts, for the test that it still does (positions 2 to 14).

Command:  python scripts/store_explanations.py --checkpoint=smollm2-135m \\
              --out=tests/smollm2_explanations.json
Time:     on 2 CPU cores half a minute.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

import conlens_jax
from conlens_jax import cli
from conlens_jax.checkpoint_flags import one_checkpoint
from conlens_jax.files.whole import write_whole

_OUT = flags.DEFINE_string("out", "explanations.json", "Where they are stored.")
_ROWS = 64
_TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome. Both cities are old.",
    "To make a cup of tea, boil some water, put a tea bag into the cup and wait.",
    "def area(width, height):\n    return width * height\n\nprint(area(2, 3))",
    "Once upon a time there was a small village near the sea, where a fisherman lived alone.",
    "In the year 1969 two astronauts walked on the Moon for the first time in history.",
]


def main() -> None:
    lens = conlens_jax.Lens.load(one_checkpoint())
    rows = [
        {
            "document": row.document,
            "position": row.position,
            "text": str(row.best.text),
            "cos": round(row.best.cos, 5),
            "kl": round(row.best.kl, 5),
        }
        for row in lens.explain(_TEXTS, slice(2, 15))[:_ROWS]
    ]
    stored = {"texts": _TEXTS, "rows": rows}
    write_whole(Path(_OUT.value), json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main)
