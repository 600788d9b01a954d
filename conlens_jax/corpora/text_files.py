"""Text from local files: .txt and .jsonl (plain, .gz or .zst) and .parquet.

All readers yield ``(index, text)`` pairs in a fixed order: files by sorted path, then rows in
order. A row without text keeps its index, so that indices do not depend on content.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora import parquet_texts
from conlens_jax.corpora.corpus import CorpusError, IndexedCorpus
from conlens_jax.corpora.file_search import find_files, left_out_note
from conlens_jax.corpora.text_lines import COMPRESSIONS, lines, missing_column, valid_text

TEXT_SUFFIXES, JSONL_SUFFIXES = (
    (suffix, *(suffix + compressed for compressed in COMPRESSIONS)) for suffix in (".txt", ".jsonl")
)


def open_text(config: CorpusConfig) -> IndexedCorpus:
    """Text files; the documents are paragraphs, separated by blank lines."""
    read_file = functools.partial(_paragraphs, encoding_errors=config.encoding_errors)
    return _open_files(config, TEXT_SUFFIXES, read_file)


def open_jsonl(config: CorpusConfig) -> IndexedCorpus:
    """One JSON object per line; the text is in ``corpus.text_field``."""
    return _open_files(config, JSONL_SUFFIXES, functools.partial(json_rows, config=config))


def open_parquet(config: CorpusConfig) -> IndexedCorpus:
    """Parquet files; ``corpus.text_field`` is the column of the text."""
    corpus = _open_files(
        config, (".parquet",), functools.partial(parquet_texts.rows, config=config)
    )
    parquet_texts.check_columns(find_files(config.path, ".parquet"), config.text_field)
    return corpus


def _open_files(
    config: CorpusConfig, suffixes: tuple[str, ...], read_file: Callable[[Path], Iterator[str]]
) -> IndexedCorpus:
    files = find_files(config.path, *suffixes)

    # A relative path still means the same files after the process changes its folder.
    absolute = [file.absolute() for file in files]

    def read(split: str, start: int) -> Iterator[tuple[int, str]]:
        texts = itertools.chain.from_iterable(read_file(file) for file in absolute)
        return itertools.islice(enumerate(texts), start, None)

    return IndexedCorpus(
        name=f"{config.kind}:{config.path}",
        config=config,
        read=read,
        details={"n_files": len(files), "n_bytes": sum(file.stat().st_size for file in files)},
        notes=left_out_note(config.path, files),
    )


def _paragraphs(file: Path, encoding_errors: str) -> Iterator[str]:
    is_blank = lambda line: line.isspace()
    for blank, group in itertools.groupby(lines(file, encoding_errors), key=is_blank):
        if not blank:
            yield "".join(group).strip()


def json_rows(file: Path, config: CorpusConfig) -> Iterator[str]:
    """The texts of a file with one JSON object per line."""
    field = config.text_field
    for number, line in enumerate(lines(file, config.encoding_errors), start=1):
        if line.isspace():
            continue
        where = f"{file}, line {number}"
        row = parsed(line, where)
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: must be a JSON object, not {type(row).__name__}")
        if field not in row:
            raise CorpusError(missing_column(field, row, where))
        yield valid_text(row[field], field, where, config.encoding_errors)


def parsed(line: str, where: str) -> object:
    """The value of a line of JSON. Raises CorpusError if it is not valid."""
    try:
        # Concatenated files have byte order marks inside.
        return json.loads(line.lstrip("\ufeff"))
    except RecursionError:
        raise CorpusError(
            f"{where}: its JSON is nested too deeply to be read; remove that field of the row"
        ) from None
    except ValueError as error:  # also an integer with more digits than Python reads
        raise CorpusError(
            f"{where}: not valid JSON ({error}); each line must be one object. Remove or fix the "
            "line (CSV, and a JSON array over many lines: corpus.kind=huggingface, with a folder)"
        ) from error
