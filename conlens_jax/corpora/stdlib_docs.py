"""Real text that is on every machine: the docstrings of Python's standard library.

Source files are parsed, not imported. The text depends on the Python version, which is therefore
part of the corpus's description.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora.corpus import CorpusError, IndexedCorpus

MIN_CHARACTERS = 120
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "idlelib"),
    *("turtledemo", "pydoc_data", "lib-dynload", "__pycache__", "_bundled"),
}
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def open_stdlib(config: CorpusConfig) -> IndexedCorpus:
    """The docstrings of the running Python; ``corpus.path`` is not used."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if not any(source_files(root)):
        raise CorpusError(
            f"corpus.kind='stdlib' finds no Python source files under {root}; choose another kind"
        )
    return IndexedCorpus(
        name="stdlib",
        config=config,
        read=lambda split, start: _enumerated(root, start),
        details={"python": platform.python_version(), "min_characters": MIN_CHARACTERS},
    )


def _enumerated(root: Path, start: int) -> Iterator[tuple[int, str]]:
    for index, text in enumerate(docstrings(root)):
        if index >= start:
            yield index, text


def docstrings(root: Path) -> Iterator[str]:
    """The docstrings in ``root`` with at least ``MIN_CHARACTERS`` characters.

    Files are in the order of :func:`source_files`, docstrings by line. Repeated texts are left out,
    so that no text is in both splits.
    """
    seen: set[str] = set()
    for path in source_files(root):
        for text in _docstrings_of_file(path):
            if text not in seen:
                seen.add(text)
                yield text


def source_files(root: Path) -> Iterator[Path]:
    """The Python files of a library without tests, demos and installed packages: those of a folder
    by name, then those of its subfolders by name."""
    for folder, subfolders, names in os.walk(root):
        # Modified in place: os.walk then visits only these, in this order.
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


# Cached: a dump reads the corpus once per split, and parsing takes most of the time.
@functools.lru_cache(maxsize=4096)
def _docstrings_of_file(path: Path) -> tuple[str, ...]:
    try:
        with warnings.catch_warnings():
            # The sources contain invalid escapes.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # Templates and deliberately broken examples also end in .py.
        return ()
    # ast.walk goes by depth; sorted by line instead. A module has no line.
    nodes = [node for node in ast.walk(tree) if isinstance(node, _WITH_DOCSTRING)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = (normalised(ast.get_docstring(node, clean=False) or "") for node in nodes)
    return tuple(text for text in texts if len(text) >= MIN_CHARACTERS)


def normalised(docstring: str) -> str:
    """The text without common indentation, and each paragraph on one line.

    Paragraphs with indented lines, list items or examples keep their lines.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return "\n\n".join(_normalised_paragraph(part) for part in paragraphs if part.strip())


def _normalised_paragraph(paragraph: str) -> str:
    lines = [line.rstrip() for line in paragraph.splitlines()]
    if any(re.match(r"\s|>>>|[-*+=~]", line) for line in lines):
        return "\n".join(lines)
    return re.sub(r"\s+", " ", " ".join(lines))
