"""Text from local files (.txt, .jsonl, .parquet) and from Hugging Face datasets.

All readers give ``(index, text)`` pairs in a fixed order: files by sorted path, then rows by their
place in the file. A row without text keeps its index, so that indices do not depend on content.
"""

from __future__ import annotations

import functools
import glob
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from conlens_jax.config import CorpusConfig
from conlens_jax.data.corpus import CorpusError, IndexedCorpus

_PARQUET_BATCH = 1024


# --- local files --------------------------------------------------------------------------------


def open_text(config: CorpusConfig) -> IndexedCorpus:
    """Text files: paragraphs, separated by blank lines, are the documents."""
    return _open_files(config, ".txt", _paragraphs)


def open_jsonl(config: CorpusConfig) -> IndexedCorpus:
    """One JSON object a line; ``corpus.text_field`` holds the text."""
    return _open_files(config, ".jsonl", functools.partial(_json_rows, field=config.text_field))


def open_parquet(config: CorpusConfig) -> IndexedCorpus:
    """Parquet files; ``corpus.text_field`` is the column of the text."""
    corpus = _open_files(
        config, ".parquet", functools.partial(_parquet_rows, field=config.text_field)
    )
    _check_parquet_columns(find_files(config.path, ".parquet"), config.text_field)
    return corpus


def find_files(path: str, suffix: str) -> list[Path]:
    """The files that ``corpus.path`` means: a file, all ``suffix`` files below a folder, or a
    glob (``**`` allowed), sorted.

    Raises:
      CorpusError: there is no such file.
    """
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        files, looked_for = sorted(Path(path).rglob(f"*{suffix}")), f"*{suffix} file in the folder"
    elif glob.has_magic(path):
        files, looked_for = sorted(map(Path, glob.glob(path, recursive=True))), "file matching"
    else:
        raise CorpusError(f"corpus.path={path!r} does not exist")
    files = [file for file in files if file.is_file()]
    if not files:
        raise CorpusError(f"there is no {looked_for} corpus.path={path!r}")
    return files


def _open_files(
    config: CorpusConfig, suffix: str, read_file: Callable[[Path], Iterator[str]]
) -> IndexedCorpus:
    files = find_files(config.path, suffix)

    def read(split: str, start: int) -> Iterator[tuple[int, str]]:
        texts = itertools.chain.from_iterable(read_file(file) for file in files)
        return itertools.islice(enumerate(texts), start, None)

    return IndexedCorpus(
        name=f"{config.kind}:{config.path}",
        config=config,
        read=read,
        details={"n_files": len(files), "n_bytes": sum(file.stat().st_size for file in files)},
    )


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file} is not UTF-8 text ({error}); convert it") from error


def _paragraphs(file: Path) -> Iterator[str]:
    for blank, lines in itertools.groupby(_lines(file), key=lambda line: not line.strip()):
        if not blank:
            yield "".join(lines).strip()


def _json_rows(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: a JSON object is needed, not {type(row).__name__}")
        yield _text_of(row, field, where)


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text of a row; a null counts as an empty text."""
    if field not in row:
        raise CorpusError(_missing_column(field, row, where))
    if not isinstance(row[field], str | None):
        raise CorpusError(
            f"{where}: corpus.text_field={field!r} holds {type(row[field]).__name__}, not text"
        )
    return row[field] or ""


def _missing_column(field: str, columns: Sequence[str] | dict[str, Any], where: str) -> str:
    return (
        f"{where}: there is no column corpus.text_field={field!r}; "
        f"the columns are {', '.join(sorted(columns)) or '(none)'}"
    )


def _open_parquet_file(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{file} is not a parquet file ({error})") from error


def _check_parquet_columns(files: list[Path], field: str) -> None:
    problems = []
    for file in files:
        with _open_parquet_file(file) as parquet:
            schema = parquet.schema_arrow
        if field not in schema.names:
            problems.append(_missing_column(field, schema.names, str(file)))
        elif not _holds_text(schema.field(field).type):
            problems.append(
                f"{file}: corpus.text_field={field!r} holds {schema.field(field).type}, not text"
            )
    if problems:
        raise CorpusError("\n".join(problems))


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _parquet_rows(file: Path, field: str) -> Iterator[str]:
    with _open_parquet_file(file) as parquet:
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH, columns=[field]):
            for text in batch.column(0).to_pylist():
                yield text or ""


# --- Hugging Face datasets ----------------------------------------------------------------------


def open_huggingface(config: CorpusConfig) -> IndexedCorpus:
    """A dataset of the Hugging Face hub, or a local folder of data files that
    ``datasets.load_dataset`` accepts.

    Raises:
      CorpusError: the dataset, its split or the text column is not there.
    """
    datasets = {"train": _load(config, config.split, "corpus.split")}
    if config.validation_split:
        datasets["validation"] = _load(config, config.validation_split, "corpus.validation_split")
    else:
        datasets["validation"] = datasets["train"]
    for dataset in datasets.values():
        # A stream may not know its columns before the first row; rows are checked when read.
        columns = dataset.column_names
        if columns is not None and config.text_field not in columns:
            raise CorpusError(_missing_column(config.text_field, columns, config.path))

    def read(split: str, start: int) -> Iterator[tuple[int, str]]:
        rows = _rows_from(datasets[split], start)
        where = f"{config.path} ({split})"
        for index, row in enumerate(rows, start):
            yield index, _text_of(row, config.text_field, where)

    return IndexedCorpus(
        name=":".join(filter(None, (config.path, config.name, config.split))),
        config=config,
        read=read,
        has_own_validation=bool(config.validation_split),
    )


def _load(config: CorpusConfig, split: str, field: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            config.path, config.name or None, split=split, streaming=config.streaming
        )
    except (ValueError, OSError) as error:
        raise CorpusError(
            f"cannot open the dataset corpus.path={config.path!r}, corpus.name={config.name!r}, "
            f"{field}={split!r}: {error}"
        ) from error


def _rows_from(dataset: Any, start: int) -> Iterator[dict[str, Any]]:
    return iter(dataset.skip(start) if start else dataset)
