"""Text → explanations: python -m conlens_jax.explain --checkpoint=runs/quickstart "some text"

``--checkpoint`` is a run folder, a checkpoint in it, a saved lens, or its hub id. Every argument
that is not a flag is a text; ``--file`` reads one from a file. Without ``--json`` a table is
printed, coloured by how much each explanation changes the model's prediction. ``--claims`` prints
what several samples agree on instead, claim by claim.
"""

from __future__ import annotations

import json
import sys

from absl import flags

from conlens_jax import cli
from conlens_jax.checkpoint_flags import STEP, one_checkpoint
from conlens_jax.config import ConfigError
from conlens_jax.corpora.corpus import CorpusError
from conlens_jax.corpora.text_lines import lines
from conlens_jax.files.paths import local_path, write_problems
from conlens_jax.inspection.explanations import SCHEMA
from conlens_jax.inspection.lens import Lens
from conlens_jax.inspection.terminal import render, render_claims

_FILE = flags.DEFINE_string("file", None, "Also explain the text of this file.")
_POSITIONS = flags.DEFINE_string("positions", "all", "all, or indices: 3,5,-1")
_SAMPLES = flags.DEFINE_integer(
    "samples", 1, "Explanations per token; more than one are sampled.", lower_bound=1
)
_CLAIMS = flags.DEFINE_bool(
    "claims", False, "Print what sampled explanations agree on (--samples of them; default: 16)."
)
_DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16; default: as trained.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Explanations written at once.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
_HTML = flags.DEFINE_string("html", None, "Also write a page to this file.")
_COLOUR = flags.DEFINE_enum("colour", "auto", ["auto", "always", "never"], "Colours of the table.")


def main(texts: list[str]) -> None:
    if not one_checkpoint():
        raise ConfigError("give --checkpoint=<run folder, saved lens or hub id>")
    positions, problems = "all", []
    try:
        positions = positions_of(_POSITIONS.value)
    except ConfigError as error:
        problems += error.problems
    if _FILE.value:
        try:
            texts = [*texts, text_of(_FILE.value)]
        except ConfigError as error:
            problems += error.problems
    if _HTML.value:
        problems += page_problems(_HTML.value)
        if _CLAIMS.value:
            problems.append("--html has no claims; leave it out, or --claims")
    if problems:
        raise ConfigError(problems)
    if not texts:
        raise ConfigError('give a text, for example "once upon a time", or --file=<file>')
    lens = Lens.load(one_checkpoint(), dtype=_DTYPE.value, step=STEP.value)
    options = {
        "seed": _SEED.value,
        "batch_size": _BATCH_SIZE.value,
        "progress": sys.stderr.isatty(),
    }
    colour = sys.stdout.isatty() if _COLOUR.value == "auto" else _COLOUR.value == "always"
    if _CLAIMS.value:
        samples = {"samples": _SAMPLES.value} if _SAMPLES.present else {}
        found = [lens.claims(text, positions, **samples, **options) for text in texts]
        if _JSON.value:
            texts = [[at.record() for at in of_text] for of_text in found]
            values = {"schema": SCHEMA, "facts": lens.facts, "texts": texts}
            print(json.dumps(values, ensure_ascii=False, indent=1))
        else:
            print("\n\n".join(render_claims(of_text, colour=colour) for of_text in found))
        return
    explanations = lens.explain(
        texts,
        positions,
        samples=_SAMPLES.value,
        decoding="sample" if _SAMPLES.value > 1 else "greedy",
        **options,
    )
    if _HTML.value:
        explanations.to_html(_HTML.value)
    if _JSON.value:
        print(explanations.to_json(), end="")
        return
    print(render(explanations, colour=colour))


def text_of(file: str) -> str:
    """The text of ``--file``, UTF-8, plain or compressed, without a byte order mark.

    Raises:
      ConfigError: it cannot be read, has another encoding, or is empty.
    """
    path = local_path(file)
    if not path.exists() or path.is_dir():
        raise ConfigError(f"--file={file} is not a file")
    try:
        # A pipe (--file=/dev/stdin) can be read only once.
        text = "".join(lines(path, hint="")) if path.is_file() else path.read_text("utf-8-sig")
    except (CorpusError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--file={file}: {error}") from error
    if not text or text.isspace():
        raise ConfigError(f"--file={file} contains no text")
    return text


def page_problems(file: str) -> list[str]:
    """Reasons why no page can be written to ``file``; folders are not made."""
    path = local_path(file)
    if path.is_dir():
        return [f"--html={file!r} is a folder; give the name of a file"]
    if not path.parent.is_dir():
        return [f"--html={file!r}: there is no folder {path.parent}; make it first"]
    return list(write_problems("--html", path.parent))


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
            f"--positions must be all or indices like 3,5,-1, not {value!r}"
        ) from None


if __name__ == "__main__":
    cli.run(main, takes_arguments=True, one_process=True)
