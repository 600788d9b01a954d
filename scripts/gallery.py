"""Writes a page of explanations of prompts that were fixed beforehand: docs/gallery.md.

Command:  python scripts/gallery.py --checkpoint=smollm2-135m --out=docs/gallery.md
Time:     on 2 CPU cores about two minutes.

Every position from the first that training had is shown with its greedy explanation: nothing is
chosen. Below each prompt are M's own continuation and, by rule, the words *said ahead*: words that
an explanation states before the token at which M first predicts them, that the context does not
have, and that M's continuation or the rest of the prompt does. At the end explanations are edited,
to see whether M follows.
"""

from __future__ import annotations

import functools
import itertools
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import conlens_jax
from conlens_jax import cli
from conlens_jax.checkpoint_flags import one_checkpoint
from conlens_jax.files.paths import local_path
from conlens_jax.files.whole import write_whole
from conlens_jax.inspection.readings import ExplainedToken
from conlens_jax.inspection.terminal import render
from conlens_jax.inspection.texts import token_lists
from conlens_jax.models.written import Written

_PROMPTS = flags.DEFINE_string("prompts", "scripts/gallery_prompts.json", "JSON list of prompts.")
_OUT = flags.DEFINE_string("out", "docs/gallery.md", "Where the page is written.")
_WIDTH, _NEW_TOKENS = 112, 12
_EDITS = (
    ("The capital of France is", " Rome"),
    ("My favourite animal is the", " horse"),
    ("She opened the door and saw a", " cat"),
    ("The weather today is", " cold"),
    ("He plays the", " violin"),
    ("The film was boring, and I left the cinema feeling", " happy"),
    ("The opposite of hot is", " dry"),
    ("For breakfast I had a cup of", " milk"),
    ("The days of the week are Monday, Tuesday, Wednesday,", " Sunday"),
    ("After the war he became a", " teacher"),
    ("In summer the leaves are", " red"),
    ("The book lies on the", " floor"),
)
"""Prompts, and the word that the explanation at the last token is made to say: fixed beforehand."""
_STRENGTHS = (1.0, 2.0)


def main() -> None:
    lens = conlens_jax.Lens.load(one_checkpoint())
    prompts = json.loads(local_path(_PROMPTS.value).read_text(encoding="utf-8"))
    sections = [section for prompt in prompts for section in _section(lens, prompt)]
    head = _HEAD.format(checkpoint=one_checkpoint(), prompts=_PROMPTS.value, number=len(prompts))
    if lens.calibration is not None:  # which says how claims of its texts are found
        sections += _steering(lens)
    write_whole(Path(_OUT.value), "\n".join([head, *sections]).rstrip() + "\n")


def _steering(lens: conlens_jax.Lens) -> Iterator[str]:
    """What M goes on with when the first word of an explanation is another one."""
    counts = {(strength, way): 0 for strength in _STRENGTHS for way in ("edit", "control")}
    rows = []
    for text, word in _EDITS:
        edit = functools.partial(_with_first_word, lens=lens, word=word)
        for strength in _STRENGTHS:
            steered = lens.steer(text, -1, edit, strength=strength, new_tokens=6)
            after = {"edit": steered.after, "control": steered.after_control}
            for way, continued in after.items():
                counts[strength, way] += continued.startswith(word)
            cells = [text, word, f"{strength:g}", steered.before, *after.values()]
            rows.append("| " + " | ".join(_in_a_cell(cell) for cell in cells) + " |")
    found = "; ".join(
        f"at strength {strength:g} after {counts[strength, 'edit']} of {len(_EDITS)} edits, after "
        f"{counts[strength, 'control']} moves in a random direction"
        for strength in _STRENGTHS
    )
    yield "\n## Steering\n"
    yield textwrap.fill(_STEERING.format(found=found), _WIDTH) + "\n"
    yield "| text | first word becomes | strength | M goes on | edited | control |"
    yield "|---|---|---|---|---|---|"
    yield from rows


def _with_first_word(written: Written, lens: conlens_jax.Lens, word: str) -> list[int]:
    """The tokens of an explanation whose first word is another one."""
    (token,) = lens.model.tokenizer.encode(word)
    place = lens.text_claims.of(list(written.tokens))[0].places[0]
    return [token if i == place else old for i, old in enumerate(written.tokens)]


def _in_a_cell(text: str) -> str:
    return "`" + text.replace("|", "¦").replace("`", "'").replace("\n", "⏎") + "`"


def _section(lens: conlens_jax.Lens, prompt: dict[str, Any]) -> Iterator[str]:
    """The Markdown of one prompt."""
    text = prompt["text"]
    first = lens.facts.get("first_position", 0)
    explained = lens.explain(text, slice(first, None), progress=False)
    (document,) = explained.documents
    continued = _continuation(lens, text)
    yield f"\n## {prompt['title']}\n"
    if prompt.get("note"):
        yield f"{textwrap.fill(prompt['note'], _WIDTH)}\n"
    yield textwrap.indent(render(explained, colour=False, width=_WIDTH), "    ") + "\n"
    shown = continued.replace("`", "'").replace("\n", "⏎")
    yield f"M goes on: `{shown}`"
    ahead = [
        f"{', '.join(words)} (at {row.position}, {row.token.strip()})"
        for row in explained
        if (words := _said_ahead(row, document, continued))
    ]
    yield f"\nSaid ahead: {'; '.join(ahead) if ahead else 'none'}."


def _continuation(lens: conlens_jax.Lens, text: Any) -> str:
    """M's greedy continuation of the whole prompt, up to its end."""
    tokens = np.array(token_lists([text], lens.model, lens.add_bos), np.int32)
    (written,) = np.asarray(lens.model.generate(tokens, _NEW_TOKENS)).tolist()
    ends = lens.model.config.eos_token_ids
    return lens.model.tokenizer.decode(list(itertools.takewhile(lambda t: t not in ends, written)))


def _said_ahead(row: ExplainedToken, document: Sequence[str], continued: str) -> list[str]:
    """Words of four letters or more that the explanation states before the text does, though M
    does not predict them yet."""
    known = _letters("".join(document[: row.position + 1]))
    later = _letters("".join(document[row.position + 1 :]) + continued)
    predicted = [_letters(token) for token, _ in row.before]
    stated = [_letters(word.text) for word in row.best.words or ()]
    return [
        word
        for word in dict.fromkeys(stated)
        if len(word) >= 4
        and word in later
        and word not in known
        and not any(token and word.startswith(token) for token in predicted)
    ]


def _letters(text: str) -> str:
    """Lower case, letters only, words kept apart by single spaces."""
    return " ".join("".join(c if c.isalpha() else " " for c in text.lower()).split())


_STEERING = """The first word that the explanation of the last token says M is about to say is
replaced (the prompts and the words were fixed beforehand), both texts are read, and the activation
is moved by `strength` times the difference of the two reconstructions; as a control it is moved as
far in a random direction. M goes on with the word {found}."""
_HEAD = """# Gallery: what a lens says of prompts that were fixed beforehand

`python scripts/gallery.py --checkpoint={checkpoint} --prompts={prompts}` writes this page: {number}
prompts, every position from the first that training had, greedy explanations, nothing chosen.
Before the first bar stands what M is about to say, then words of the context, and after the second
bar its last tokens; a dot is something that the lens cannot name. *KL*: how much M's prediction
changes when the reconstruction takes the activation's place. *Said ahead*: words that an
explanation states before the text does and before M predicts them, and that come later in the
prompt or in M's continuation."""

if __name__ == "__main__":
    cli.run(main)
