"""The code in the documents: blocks, and the commands of shell blocks."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    file
    for file in ROOT.rglob("*.md")
    if not {"third_party", ".venv", "build"} & set(file.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in file.relative_to(ROOT).parts)
)
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
_INLINE = re.compile(r"`((?:python|bash) [^`]*)`")
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
# Something that a reader fills in.
_PLACEHOLDER = re.compile(r"<.*>|…")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language (empty where none is named), and its text."""

    language: str
    text: str


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a shell block.

    Attributes:
      words: without assignments in front, redirections and comments.
    """

    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)

    @property
    def entry_point(self) -> tuple[str, list[str]] | None:
        """(module or script, its arguments) of ``python -m module …`` and ``python script …``."""
        if self.words[0] != "python":
            return None
        rest = list(self.words[1:])
        if rest[0] == "-m":
            rest = rest[1:]
        return (rest[0], rest[1:]) if rest[0].startswith(("conlens_jax.", "scripts/")) else None


def blocks(document: Path) -> list[Block]:
    """The fenced blocks, in order."""
    return [Block(*found) for found in _FENCED.findall(document.read_text(encoding="utf-8"))]


def indented_code(document: Path) -> list[str]:
    """What is set as code by its indentation alone: no test looks into it."""
    return _INDENTED.findall(_FENCED.sub("", document.read_text(encoding="utf-8")))


def commands(text: str) -> list[Command]:
    """The commands of a shell block."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
                continue
            while words and _ASSIGNMENT.match(words[0]):
                del words[0]
            if words:
                found.append(Command(tuple(words)))
            words = []
    return found


def inline_commands(document: Path) -> list[Command]:
    """Commands within sentences, but for those that a reader has to fill in."""
    text = _FENCED.sub("", document.read_text(encoding="utf-8"))
    return [
        command
        for line in _INLINE.findall(text)
        if not _PLACEHOLDER.search(line)
        for command in commands(line.replace("\n", " "))
    ]
