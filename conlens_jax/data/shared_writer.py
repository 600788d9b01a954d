"""A cache filled by several processes: each has all rows, only the first process writes them.

Activations are small compared with the model's work, so every process can keep a batch of them,
and the files are those of a dump in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conlens_jax.data.cache_metadata import CacheMetadata, cache_is_complete
from conlens_jax.data.cache_writer import PROGRESS_FILE, CacheWriter
from conlens_jax.data.rows import Rows
from conlens_jax.parallel.processes import broadcast_from_first, check_same


class SharedWriter:
    """A :class:`CacheWriter` in the first process; the others follow its progress.

    Attributes:
      complete: the finished cache already exists; there is nothing to write.
      rows_before: rows in complete shards of an interrupted dump.
      cursor: of the last of these; None: start from the beginning.
      rows_appended: ``rows_before`` plus the rows appended since.

    Raises:
      CacheError: see :class:`CacheWriter`.
      ProcessError: the processes have different settings, or the first one failed.
    """

    def __init__(self, folder: Path, metadata: CacheMetadata, rows_per_shard: int):
        check_same("model, corpus or setting of the dump", metadata.to_json().encode())
        self.folder = folder
        self._writer: CacheWriter | None = None
        resumed = broadcast_from_first(lambda: self._start(metadata, rows_per_shard))
        self.complete = resumed is None
        self.rows_before, self.cursor = resumed or (0, None)
        self.rows_appended = self.rows_before

    def _start(self, metadata: CacheMetadata, rows_per_shard: int) -> tuple[int, Any] | None:
        if cache_is_complete(self.folder, metadata):
            # A kill right after the last rename leaves it.
            (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
            return None
        self._writer = CacheWriter(self.folder, metadata, rows_per_shard)
        return self._writer.rows_written, self._writer.cursor

    def append(self, rows: Rows, cursors: list[Any]) -> None:
        """See :meth:`CacheWriter.append`; every process passes the same rows."""
        self.rows_appended += len(rows)
        if self._writer is not None:
            self._writer.append(rows, cursors)

    def finish(self) -> None:
        """See :meth:`CacheWriter.finish`; returns when the cache is finished."""

        def finish() -> None:
            assert self._writer is not None
            self._writer.finish()

        broadcast_from_first(finish)
