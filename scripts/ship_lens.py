"""Makes a saved lens part of the package, with the example that its explorer opens on.

Command:  python scripts/ship_lens.py --checkpoint=my-lens --name=smollm2-135m
Then:     python scripts/store_explanations.py --checkpoint=smollm2-135m \\
              --out=tests/smollm2_explanations.json
          python scripts/gallery.py --checkpoint=smollm2-135m --out=docs/gallery.md
Time:     on 2 CPU cores half a minute for SmolLM2-135M.

The lens comes from ``measure_lens.py --fit_support=my-lens --dtype=bfloat16``, so it has a support
and metrics. Its card is written by hand: that of an earlier lens of the name stays.
"""

from __future__ import annotations

import shutil

from absl import flags

import conlens_jax
from conlens_jax import cli
from conlens_jax.checkpoint_flags import one_checkpoint
from conlens_jax.explorer.examples import example_text, keep_example
from conlens_jax.explorer.text_runs import Asked, TextRuns
from conlens_jax.explorer.turns import Turns
from conlens_jax.explorer.warming import places_of
from conlens_jax.lens.saved import CONFIG, METRICS, SHIPPED, SIDES, resolve

_NAME = flags.DEFINE_string("name", None, "By which the package loads it.", required=True)
_FILES = (CONFIG, METRICS, *(f"{side}.safetensors" for side in SIDES))
_MOST_BYTES = 24_000_000
"""Of all files of a lens: it is part of every download of the package."""


def main() -> None:
    source = resolve(one_checkpoint() or "")
    missing = [name for name in _FILES if not (source / name).is_file()]
    if missing:
        raise SystemExit(f"{source}: a saved lens has {', '.join(missing)}, too (Lens.save)")
    size = sum((source / name).stat().st_size for name in _FILES)
    if size > _MOST_BYTES:
        raise SystemExit(
            f"{source} has {size / 1e6:.0f} MB, more than {_MOST_BYTES / 1e6:.0f}: save it with "
            "dtype='bfloat16', or train adapters of a lower rank"
        )
    if conlens_jax.Lens.load(str(source)).calibration is None:
        raise SystemExit(f"{source} has no support: measure_lens.py --fit_support fits it")
    shipped = SHIPPED / _NAME.value
    shipped.mkdir(exist_ok=True)
    for name in _FILES:
        shutil.copyfile(source / name, shipped / name)

    lens = conlens_jax.Lens.load(str(shipped))
    asked = Asked(example_text(lens))
    runs = TextRuns([lens], Turns(most=1))
    explained = runs.explain_whole(asked, runs.run_of(asked))
    keep_example(lens, asked.text, explained, places_of(str(shipped), writing=True))
    print(f"{shipped}: {size / 1e6:.1f} MB, and the example")


if __name__ == "__main__":
    cli.run(main)
