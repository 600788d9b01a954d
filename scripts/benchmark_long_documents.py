"""Time and memory of reading contexts from long documents, by their size.

Command:  python scripts/benchmark_long_documents.py --megabytes=1,8,32 --documents=4
Time:     20 seconds on 2 CPU cores.

Writes documents of each size to a .jsonl file, and reads the contexts that a dump would keep
(``seq_len`` tokens each), in a separate process for each size. For comparison, ``--whole``
tokenises the whole documents.

Measured on 2 busy CPU cores, 4 documents per size: 1 MB 0.25 s and 6 MB of memory; 8 MB 1.5 s and
33 MB; 32 MB 5.2 s and 161 MB: the memory is that of one document. With ``--whole``: 1 MB 8.2 s and
195 MB, 8 MB 69 s and 1,338 MB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora.first_tokens import first_tokens
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.models.tokenizer import Tokenizer, train_bpe_tokenizer

_WORDS = "the small cat sat on a mat and then one old dog ran after it over hill and dale".split()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = _parser().parse_args(arguments)
    results = []
    for size in map(float, options.megabytes.split(",")):
        # A separate process: the peak memory of a process never decreases.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            task = (size, options.documents, options.seq_len, options.whole)
            results.append(pool.apply(_measure, task))
        print(
            "{megabytes:g} MB per document: {seconds:.2f} s and {memory_mb:.0f} MB above the "
            "start for {documents} documents".format(**results[-1])
        )
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _measure(megabytes: float, documents: int, seq_len: int, whole: bool) -> dict[str, Any]:
    tokenizer = train_bpe_tokenizer([" ".join(_WORDS)] * 10, 400)
    with tempfile.TemporaryDirectory() as folder:
        _write_documents(Path(folder) / "long.jsonl", int(megabytes * 2**20), documents)
        corpus = open_corpus(
            CorpusConfig(kind="jsonl", path=folder, n_documents=0, validation_fraction=1e-9)
        )
        # One short text first, so that one-time loading is not counted.
        first_tokens(tokenizer.encode_batch, ["a text"], seq_len)
        before, started = _largest_memory(), time.perf_counter()
        kept = [
            _context(tokenizer, document.text, seq_len, whole)
            for document in corpus.documents("train")
        ]
        seconds = time.perf_counter() - started
    return {
        "megabytes": megabytes,
        "documents": len(kept),
        "tokens": sum(map(len, kept)),
        "seconds": seconds,
        "memory_mb": _largest_memory() - before,
    }


def _context(tokenizer: Tokenizer, text: str, seq_len: int, whole: bool) -> list[int]:
    if whole:
        return tokenizer.encode(text)[:seq_len]
    return first_tokens(tokenizer.encode_batch, [text], seq_len)[0][:seq_len]


def _write_documents(file: Path, size: int, count: int) -> None:
    rng = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            piece = " ".join(rng.choices(_WORDS, k=2000)) + " "
            stream.write(f'{{"text": "{number} ')
            for _ in range(size // len(piece) + 1):
                stream.write(piece)
            stream.write('"}\n')


def _largest_memory() -> float:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", default="1,8,32", help="document sizes, comma-separated")
    parser.add_argument("--documents", type=int, default=4, help="documents of each size")
    parser.add_argument("--seq_len", type=int, default=64, help="tokens to keep of each")
    parser.add_argument("--whole", action="store_true", help="tokenise to the end")
    parser.add_argument("--json", default="", help="file for all numbers")
    return parser


if __name__ == "__main__":
    main()
