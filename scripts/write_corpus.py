"""Writes the documents of a corpus as jsonl, such as one of several that are to be mixed.

Command:  python scripts/write_corpus.py --kind=stdlib --out=corpus/python.jsonl
Then:     --config.corpus.kind=jsonl --config.corpus.path='corpus/*.jsonl' reads all files there.

The documents of corpus.kind="model" are such files already, in the folder that its run prints.
"""

from __future__ import annotations

import argparse
import heapq
import json
from pathlib import Path

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora.corpus import SPLITS
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.files.whole import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="stdlib", choices=("stdlib", "stories", "sums"))
    parser.add_argument("--documents", type=int, default=40_000, help="at most so many")
    parser.add_argument("--seed", type=int, default=0, help="of a generator")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    config = CorpusConfig(arguments.kind, n_documents=arguments.documents, seed=arguments.seed)
    corpus = open_corpus(config)
    splits = (corpus.documents(split) for split in SPLITS)
    documents = heapq.merge(*splits, key=lambda document: document.index)
    lines = [json.dumps({"text": document.text}, ensure_ascii=False) for document in documents]
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, [("\n".join(lines) + "\n").encode()])
    print(f"{len(lines)} documents in {out}")


if __name__ == "__main__":
    main()
