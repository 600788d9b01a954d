"""Text from a column of parquet files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora.corpus import CorpusError
from conlens_jax.corpora.text_lines import bad_bytes_message, missing_column

_ROWS_AT_ONCE = 1024


def check_columns(files: list[Path], field: str) -> None:
    """Raises CorpusError if a file has no column of that name, or the column is not text."""
    problems = []
    for file in files:
        with _opened(file) as parquet:
            schema = parquet.schema_arrow
        if field not in schema.names:
            problems.append(missing_column(field, schema.names, str(file)))
        elif not _is_text(schema.field(field).type):
            problems.append(
                f"{file}: corpus.text_field={field!r} is {schema.field(field).type}, not text"
            )
    if problems:
        raise CorpusError("\n".join(problems))


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def rows(file: Path, config: CorpusConfig) -> Iterator[str]:
    """The texts of a file; a null counts as an empty text."""
    import pyarrow

    before = 0
    with _opened(file) as parquet:
        # Few rows at once: texts can be long.
        batches = parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[config.text_field])
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise CorpusError(
                    f"{file}, after row {before}: the file is damaged ({error}); download it again"
                ) from error
            if batch is None:
                return
            for text in _texts(batch.column(0), before, file, config.encoding_errors):
                yield text or ""
            before += len(batch)


def _texts(column: Any, before: int, file: Path, encoding_errors: str) -> Iterator[str | None]:
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        yield from _decoded(column, before, file, encoding_errors)


def _decoded(column: Any, before: int, file: Path, encoding_errors: str) -> Iterator[str | None]:
    """Decodes row by row, to name the row in the error."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    for row, value in enumerate(column.cast(pyarrow.large_binary()).to_pylist(), start=before + 1):
        try:
            yield None if value is None else value.decode("utf-8")
        except UnicodeDecodeError as error:
            if encoding_errors != "replace":
                raise CorpusError(bad_bytes_message(f"{file}, row {row}", error)) from error
            yield value.decode("utf-8", "replace")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{file} is not a readable parquet file ({error})") from error
    with parquet:
        yield parquet
