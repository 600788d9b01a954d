"""Text → explanations: python -m conlens_jax.explain --checkpoint=runs/quickstart "some text"

``--checkpoint`` is a run folder, a checkpoint in it, a saved lens, or a hub id of one. Every
argument that is no flag is a text; ``--file`` reads one from a file. Without ``--json`` a table is
printed, coloured by how much each explanation changes what the model predicts.
"""

from __future__ import annotations

import sys

from absl import flags

from conlens_jax import cli
from conlens_jax.config import ConfigError
from conlens_jax.config.paths import local_path
from conlens_jax.evaluate import CHECKPOINT, STEP
from conlens_jax.inspection.lens import Lens
from conlens_jax.inspection.terminal import render

_FILE = flags.DEFINE_string("file", None, "Also explain the text of this file.")
_POSITIONS = flags.DEFINE_string("positions", "all", "all, or indices: 3,5,-1")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Explanations a token; more than one are sampled.")
_DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16; default: as trained.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Explanations written at once.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
_HTML = flags.DEFINE_string("html", None, "Also write a page to this file.")
_COLOUR = flags.DEFINE_enum("colour", "auto", ["auto", "always", "never"], "Colours of the table.")


def main(texts: list[str]) -> None:
    if not CHECKPOINT.value:
        raise ConfigError(["give --checkpoint=<run folder, saved lens or hub id>"])
    if _FILE.value:
        texts = [*texts, local_path(_FILE.value).read_text(encoding="utf-8")]
    if not texts:
        raise ConfigError(['give a text, for example "once upon a time", or --file=<file>'])
    lens = Lens.load(CHECKPOINT.value, dtype=_DTYPE.value, step=STEP.value)
    found = lens.explain(
        texts,
        positions_of(_POSITIONS.value),
        samples=_SAMPLES.value,
        decoding="sample" if _SAMPLES.value > 1 else "greedy",
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
        progress=sys.stderr.isatty(),
    )
    if _HTML.value:
        found.to_html(_HTML.value)
    if _JSON.value:
        print(found.to_json(), end="")
        return
    colour = sys.stdout.isatty() if _COLOUR.value == "auto" else _COLOUR.value == "always"
    print(render(found, colour=colour))


def positions_of(value: str) -> str | list[int]:
    """``all``, or whole numbers separated by commas.

    Raises:
      ConfigError: something else.
    """
    if value == "all":
        return value
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise ConfigError(
            [f"--positions must be all or indices like 3,5,-1, not {value!r}"]
        ) from None


if __name__ == "__main__":
    cli.run(main, takes_arguments=True, one_process=True)
