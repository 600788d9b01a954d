"""The text that the page opens on, explained once and kept.

A run folder and a saved lens keep it beside the lens (``example.json``), where that can be written;
else it is in the cache folder. It is used again only by the lens that it is of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from conlens_jax.files.whole import write_whole
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.lens import Lens
from conlens_jax.inspection.texts import token_lists

FILE = "example.json"
_FORMAT = 1
_ENOUGH_BYTES = 1 << 16

TEXTS = (
    "once upon a time there was a shy fox named anna . she found a red kite near the lake . one "
    "day anna met a brown dog . the dog was hungry and anna was happy . she gave the dog some "
    "bread .",
    "What is 47 plus 25? First the ones: 7 plus 5 is 12, so write 2 and carry 1. Then the tens: 4 "
    "plus 2 plus 1 is 7. The answer is 72.",
    "The capital of France is Paris, a city on the river Seine. Its most famous tower was built in "
    "1889 for a world fair, and many people thought that it was ugly. Today millions of visitors "
    "climb its stairs every year to look at the city from above.",
)
"""Examples for models of different texts; the longest is read last."""

_log = logging.getLogger(__name__)


def example_text(lens: Lens) -> str:
    """The one that the lens is most at home with: of its tokens the largest share was in the
    training texts. Empty if the model reads none of them."""

    def known(text: str) -> float:
        try:
            (ids,) = token_lists([text], lens.model, lens.add_bos)
        except ValueError:  # longer than the model can read
            return -1.0
        unknown = lens.model.tokenizer.unk_id
        seen = [t for t in ids if t != unknown and lens.trained_on.has_token(t)]
        return len(seen) / len(ids)

    shares = [round(known(text), 2) for text in TEXTS]
    # Of equals the last: a model that knows all texts is one of real text.
    share, _, text = max(zip(shares, range(len(TEXTS)), TEXTS, strict=True))
    return text if share >= 0 else ""


def fingerprint(lens: Lens, text: str) -> str:
    """Of a lens and a text: changes with the model, the shape of the lens and its trained arrays
    (the small ones: training moves them all)."""
    digest = hashlib.sha256()
    calibration = None if lens.calibration is None else lens.calibration.to_json()
    about = [_FORMAT, text, lens.facts, lens.spec.text_len, calibration]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    size = 0
    for leaf in sorted(jax.tree.leaves(lens.trainable), key=lambda leaf: leaf.size):
        if size and size + leaf.nbytes > _ENOUGH_BYTES:
            break
        size += leaf.nbytes
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def kept_example(lens: Lens, text: str, places: Sequence[Path]) -> Explanations | None:
    """The example if one of the files has it, of this lens."""
    key = fingerprint(lens, text)
    for file in _files(places, key):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(file.read_text(encoding="utf-8"))
            if values["fingerprint"] == key:
                return Explanations.from_json(json.dumps(values["explanations"]))
    return None


def last_example(folders: Sequence[Path]) -> tuple[str, Explanations] | None:
    """The text and the explanations that lie beside a lens, of whichever lens they are."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return str(values["text"]), Explanations.from_json(json.dumps(values["explanations"]))
    return None


def keep_example(lens: Lens, text: str, explained: Explanations, places: Sequence[Path]) -> None:
    """Writes it into the first of the folders that can be written."""
    key = fingerprint(lens, text)
    values = {"fingerprint": key, "text": text, "explanations": json.loads(explained.to_json())}
    for file in _files(places, key):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(values, ensure_ascii=False))
            return
        except OSError as error:
            _log.debug("%s: %s", file, error)


def _files(places: Sequence[Path], key: str) -> list[Path]:
    """In a lens's folder under a name of its own, in the cache (the last place) by lens."""
    *folders, cache = places
    return [*(folder / FILE for folder in folders), cache / f"{key[:32]}.json"]
