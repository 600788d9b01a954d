"""Lines of text files, plain or compressed, and errors about text that is not valid Unicode.

Every error names the file, the line, the reason and the fix.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from conlens_jax.corpora.corpus import CorpusError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of supported compressed files, with pyarrow's names of the formats."""

_REPLACE_HINT = ", or set corpus.encoding_errors=replace, which replaces it by U+FFFD"
_SURROGATE = re.compile("[\ud800-\udfff]")
# The longer mark first: UTF-32's begins with UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_BYTES_LOOKED_AT = 4096


def lines(file: Path, encoding_errors: str = "error", hint: str = _REPLACE_HINT) -> Iterator[str]:
    """The lines of a UTF-8 file, ending in ``\\n``; a byte order mark is dropped.

    ``hint`` is appended to the message about bytes that are not UTF-8.

    Raises:
      CorpusError: the file has another encoding, is a damaged archive or cannot be read, or has
        bytes that are not UTF-8 and ``encoding_errors`` is ``"error"``.
    """
    errors = "replace" if encoding_errors == "replace" else "strict"
    try:
        with open_bytes(file) as stream:
            _check_encoding(file, stream)
        with (
            open_bytes(file) as stream,
            io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors) as text,
        ):
            yield from text
    except UnicodeDecodeError as error:
        raise CorpusError(_first_bad_line(file, hint)) from error
    except OSError as error:
        raise CorpusError(_unreadable_message(file, error)) from error


@contextlib.contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """The content of a file, decompressed according to its suffix."""
    compression = COMPRESSIONS.get(file.suffix)
    if compression is None:
        with file.open("rb") as stream:
            yield stream
        return
    import pyarrow

    # pyarrow's streams cannot be read by lines.
    with (
        pyarrow.input_stream(str(file), compression=compression) as packed,
        io.BufferedReader(packed) as stream,
    ):
        yield stream


def _check_encoding(file: Path, stream: BinaryIO) -> None:
    start = stream.read(_BYTES_LOOKED_AT)
    marked = [name for mark, name in _OTHER_MARKS.items() if start.startswith(mark)]
    # Without a mark, ASCII letters in UTF-16 are valid UTF-8: every second byte is NUL.
    halves = [start[first::2] for first in (0, 1)]
    if not marked and any(half.count(0) > 0.4 * len(half) for half in halves if half):
        marked = ["UTF-16 or UTF-32"]
    if marked:
        raise CorpusError(
            f"{file} is {marked[0]}, but must be UTF-8: convert it, for example with "
            f"iconv -f {marked[0].split()[0]} -t UTF-8"
        )


def _first_bad_line(file: Path, hint: str) -> str:
    """Reads the file again: the decoder only reports a position in its buffer."""
    with open_bytes(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return bad_bytes_message(f"{file}, line {number}", error, hint)
    return f"{file} is not UTF-8; convert it{hint}"


def bad_bytes_message(where: str, error: UnicodeDecodeError, hint: str = _REPLACE_HINT) -> str:
    """The message about bytes that are not UTF-8."""
    byte = error.object[error.start]
    return (
        f"{where}: not UTF-8 (byte {error.start + 1}, 0x{byte:02x}: {error.reason}); convert it, "
        f"for example with iconv -f LATIN1 -t UTF-8{hint}"
    )


def _unreadable_message(file: Path, error: OSError) -> str:
    if file.suffix in COMPRESSIONS and error.errno is None:
        return (
            f"{file} is damaged, or is not {COMPRESSIONS[file.suffix]} ({error}); download it again"
        )
    return f"{file} cannot be read ({error.strerror or error})"


def valid_text(value: Any, field: str, where: str, encoding_errors: str) -> str:
    """The text of a row; null counts as an empty text.

    Raises:
      CorpusError: it is not text; or it has an unpaired surrogate, which JSON can contain
        (``\\ud83d``) but no tokenizer reads, and ``encoding_errors`` is ``"error"``.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(
            f"{where}: corpus.text_field={field!r} is {type(value).__name__}, not text; choose "
            "another column, or store the text of each row as a string"
        )
    if value.isascii():  # O(1)
        return value
    found = _SURROGATE.search(value)
    if found is None:
        return value
    if encoding_errors == "replace":
        return _SURROGATE.sub("\ufffd", value)
    raise CorpusError(
        f"{where}: character {found.start() + 1} of corpus.text_field={field!r} is "
        f"\\u{ord(found[0]):04x}, an unpaired surrogate, which is not text; fix the row"
        f"{_REPLACE_HINT}"
    )


def missing_column(field: str, columns: Any, where: str) -> str:
    """The message for a row or file without the text column."""
    return (
        f"{where}: there is no column corpus.text_field={field!r}; "
        f"the columns are {', '.join(sorted(map(str, columns))) or '(none)'}"
    )
