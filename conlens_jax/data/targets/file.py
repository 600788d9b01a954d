"""Targets from files: explanations of your own, by document and position.

Each row of a jsonl or parquet file is an explanation. Its columns are ``document`` (the index of
the document in the corpus), ``position`` (P, an index into the document's tokens) and
``explanation``, or those of the files of natural-language autoencoders:

* document: ``doc_id``, which ends with the index (``HuggingFaceFW/fineweb:train:17``);
* position: ``token_position``, ``token_pos``, or ``n_raw_tokens``, the number of tokens up to P;
* explanation: ``api_explanation``, the ``<explanation>`` of a ``response`` (``av_sft``), or the
  ``<text>`` of a ``prompt`` (``ar_sft``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conlens_jax.config import ConfigError
from conlens_jax.corpora.file_search import find_files
from conlens_jax.corpora.text_files import JSONL_SUFFIXES, parsed
from conlens_jax.corpora.text_lines import lines
from conlens_jax.data.rows import Rows
from conlens_jax.data.targets.protocol import NextTokens, Targets
from conlens_jax.models.tokenizer import Tokenizer

_FIELD = "target.path"
_LAST_NUMBER = re.compile(r"\d+(?=\D*$)")


def _tagged(tag: str) -> Callable[[Any], str | None]:
    inside = re.compile(f"<{tag}>(.*?)(?:</{tag}>|$)", re.DOTALL)

    def text(value: Any) -> str | None:
        found = inside.search(value) if isinstance(value, str) else None
        return found and found[1]

    return text


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _last_number(value: Any) -> int | None:
    if isinstance(value, str) and (found := _LAST_NUMBER.search(value)):
        return int(found[0])
    return _number(value)


def _last_of(count: Any) -> int | None:
    return None if _number(count) is None else count - 1


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


# By what a column means: the names that it may have, the first one first, and how it is read.
_COLUMNS: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "document": {"document": _number, "doc_id": _last_number},
    "position": {
        **dict.fromkeys(("position", "token_position", "token_pos"), _number),
        "n_raw_tokens": _last_of,
    },
    "explanation": {
        "explanation": _text,
        "api_explanation": _text,
        "response": _tagged("explanation"),
        "prompt": _tagged("text"),
    },
}


class FileTargets(Targets):
    """Finds the explanation of each row.

    Rows are at the positions that have one; of two explanations of a position the first counts.

    Attributes:
      content: identifies all explanations, whatever files they are in.

    Raises:
      ValueError: there is no file, or a row cannot be read; with the file and the fix.
    """

    def __init__(self, path: str, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._texts: dict[int, dict[int, str]] = {}
        for file in find_explanations(path):
            for where, row in _rows(file):
                document, position, text = (_value(row, what, where) for what in _COLUMNS)
                self._texts.setdefault(document, {}).setdefault(position, text.strip())
        ordered = sorted((d, p, text) for d, of in self._texts.items() for p, text in of.items())
        self.content = {"explanations": hashlib.sha256(repr(ordered).encode()).hexdigest()}

    def positions(self, document: int, possible: np.ndarray) -> np.ndarray:
        """Those that have an explanation."""
        return possible[np.isin(possible, list(self._texts.get(document, ())))]

    def texts(self, rows: Rows, next_tokens: NextTokens | None = None) -> list[Sequence[int]]:
        """See :meth:`~.protocol.Targets.texts`."""
        places = zip(rows.documents_N.tolist(), rows.positions_N.tolist(), strict=True)
        return self._tokenizer.encode_batch([self._texts[d][p] for d, p in places])


def find_explanations(path: str) -> list[Path]:
    """The files of ``target.path``; ValueError if there is none."""
    return find_files(path, *JSONL_SUFFIXES, ".parquet", field=_FIELD)


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row of a file, and where it is."""
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    for number, line in enumerate(lines(file), start=1):
        if not line.isspace():
            where = f"{file}, line {number}"
            row = parsed(line, where)
            if not isinstance(row, dict):
                raise ConfigError(f"{_FIELD}: {where} must be an object, not {row!r:.40}")
            yield where, row


def _parquet_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = [name for names in _COLUMNS.values() for name in names]
    try:
        with pq.ParquetFile(file) as content:
            columns = [name for name in content.schema_arrow.names if name in known]
            number = 0
            for batch in content.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield f"{file}, row {number}", row
                    number += 1
    except pa.ArrowException as error:
        raise ConfigError(f"{_FIELD}: {file} cannot be read as parquet ({error})") from error


def _value(row: Mapping[str, Any], what: str, where: str) -> Any:
    """The document, position or explanation of a row."""
    names = _COLUMNS[what]
    for name, read in names.items():
        if (value := read(row.get(name))) is not None:
            return value
    found = ", ".join(f"{name}={row[name]!r:.40}" for name in names if name in row) or "none"
    raise ConfigError(
        f"{_FIELD}: {where} has no {what}: it is in a column {', '.join(names)}; found: {found}"
    )
