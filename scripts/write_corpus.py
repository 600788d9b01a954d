"""Writes the documents of a corpus as jsonl, such as one of several that are to be mixed.

Command:  python scripts/write_corpus.py --kind=stdlib --out=corpus/python.jsonl
          python scripts/write_corpus.py --packages=jax,numpy --out=corpus/packages.jsonl
          python scripts/write_corpus.py --paragraphs='/usr/share/common-licenses/*' \\
              --out=licences.jsonl
Then:     --config.corpus.kind=jsonl --config.corpus.path='corpus/*.jsonl' reads all files there.

The documents of corpus.kind="model" are such files already, in the folder that its run prints.
"""

from __future__ import annotations

import argparse
import glob
import heapq
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora.corpus import SPLITS
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.corpora.stdlib_docs import docstrings
from conlens_jax.files.whole import write_atomically

LEAST_LETTERS = 240
"""A shorter paragraph is no document: it has too few tokens to read."""


def generated(arguments: argparse.Namespace) -> Iterator[str]:
    config = CorpusConfig(arguments.kind, n_documents=arguments.documents, seed=arguments.seed)
    corpus = open_corpus(config)
    splits = (corpus.documents(split) for split in SPLITS)
    for document in heapq.merge(*splits, key=lambda document: document.index):
        yield document.text


def packages(names: str) -> Iterator[str]:
    """The docstrings of installed packages, each once. They are parsed, not imported."""
    folders: list[str] = []
    for name in names.split(","):
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise SystemExit(f"--packages: {name!r} is no installed package")
        folders += found.submodule_search_locations
    texts = (text for folder in folders for text in docstrings(Path(folder)))
    yield from dict.fromkeys(text for text in texts if len(text) >= LEAST_LETTERS)


def paragraphs(pattern: str) -> Iterator[str]:
    """The paragraphs of text files, which blank lines divide, each once, without indentation. A
    link, which is another name of a file, is not read."""
    seen = set()
    for file in sorted(map(Path, glob.glob(pattern))):
        if file.is_symlink() or not file.is_file():
            continue
        for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8", errors="replace")):
            text = re.sub(r"[ \t]+", " ", paragraph.strip())
            if len(text) >= LEAST_LETTERS and text not in seen:
                seen.add(text)
                yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="stdlib", choices=("stdlib", "stories", "sums"))
    parser.add_argument("--documents", type=int, default=40_000, help="at most so many")
    parser.add_argument("--seed", type=int, default=0, help="of a generator")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--paragraphs", default="", help="of text files (a glob), not of a kind")
    other.add_argument("--packages", default="", help="their docstrings, not a kind: a,b,…")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    if arguments.packages:
        texts = packages(arguments.packages)
    elif arguments.paragraphs:
        texts = paragraphs(arguments.paragraphs)
    else:
        texts = generated(arguments)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    if arguments.paragraphs and not lines:
        parser.error(
            f"--paragraphs={arguments.paragraphs!r}: no file there has a paragraph of at "
            f"least {LEAST_LETTERS} letters"
        )
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, [("\n".join(lines) + "\n").encode()])
    print(f"{len(lines)} documents in {out}")


if __name__ == "__main__":
    main()
