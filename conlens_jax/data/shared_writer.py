"""A cache that several processes fill together: each has all rows, the first one writes them.

Activations are small beside the model's work on them, so that every process may hold a batch of
them, and one writer makes the files of a dump in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conlens_jax.data.cache_metadata import CacheMetadata, cache_is_complete
from conlens_jax.data.cache_writer import CacheWriter
from conlens_jax.data.rows import Rows
from conlens_jax.parallel.processes import broadcast_from_first, check_same


class SharedWriter:
    """A :class:`CacheWriter` in the first process; the others know how far it is.

    Attributes:
      complete: the cache was there already, whole; there is nothing to write.
      rows_before: rows in whole shards that an interrupted dump left.
      cursor: of the last of these; None: begin at the beginning.
      rows_appended: ``rows_before`` and the rows appended since.

    Raises:
      CacheError: see :class:`CacheWriter`.
      ProcessError: the processes want different caches, or the first one failed.
    """

    def __init__(self, folder: Path, metadata: CacheMetadata, rows_per_shard: int):
        check_same("model, corpus or setting of the dump", metadata.to_json().encode())
        self.folder = folder
        self._writer: CacheWriter | None = None
        begun = broadcast_from_first(lambda: self._begin(metadata, rows_per_shard))
        self.complete = begun is None
        self.rows_before, self.cursor = begun or (0, None)
        self.rows_appended = self.rows_before

    def _begin(self, metadata: CacheMetadata, rows_per_shard: int) -> tuple[int, Any] | None:
        if cache_is_complete(self.folder, metadata):
            return None
        self._writer = CacheWriter(self.folder, metadata, rows_per_shard)
        return self._writer.rows_written, self._writer.cursor

    def append(self, rows: Rows, cursors: list[Any]) -> None:
        """See :meth:`CacheWriter.append`; every process gives the same rows."""
        self.rows_appended += len(rows)
        if self._writer is not None:
            self._writer.append(rows, cursors)

    def finish(self) -> None:
        """See :meth:`CacheWriter.finish`; returns when the cache is there."""

        def finish() -> None:
            assert self._writer is not None
            self._writer.finish()

        broadcast_from_first(finish)
