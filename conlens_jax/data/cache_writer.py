"""Writes an activation cache shard by shard, so that an interrupted dump can resume."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conlens_jax.data.cache_metadata import (
    METADATA_FILE,
    CacheError,
    CacheMetadata,
    Shard,
    cache_is_complete,
    raise_on_other_settings,
    to_plain,
)
from conlens_jax.data.rows import ACTIVATION_DTYPES, Rows
from conlens_jax.data.shard_files import shard_chunks, shard_problem
from conlens_jax.files.paths import local_path
from conlens_jax.files.whole import sync_folder, write_atomically

PROGRESS_FILE = "progress.json"


class CacheWriter:
    """Writes a cache shard by shard, and resumes an interrupted one.

    Rows are kept in memory until a shard is full. After a restart with the same settings
    ``rows_written`` and ``cursor`` tell where to resume: ``cursor`` is the one the caller passed
    with the last saved row (``None``: start from the beginning), so the next row is the one after
    it.

        writer = CacheWriter(folder, metadata, rows_per_shard=4096)
        for rows, cursors in dump_after(writer.cursor):
            writer.append(rows, cursors)
        writer.finish()

    Raises:
      CacheError: ``folder`` is already finished (see :func:`cache_is_complete`), or
        ``<folder>.partial`` has other settings.
    """

    def __init__(self, folder: str | Path, metadata: CacheMetadata, rows_per_shard: int):
        if rows_per_shard < 1:
            raise ValueError(f"dump.rows_per_shard must be at least 1, not {rows_per_shard}")
        self.folder = local_path(folder)
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        if cache_is_complete(self.folder, metadata):
            raise CacheError(f"{self.folder} is already complete; open it instead")
        self.metadata = metadata
        self.rows_per_shard = rows_per_shard
        self._shards: list[Shard] = []
        self._pending: list[Rows] = []
        self._pending_cursors: list[Any] = []
        self._closed = False
        self.partial.mkdir(parents=True, exist_ok=True)
        self._resume()

    @property
    def rows_written(self) -> int:
        """Rows in complete shards, which an interruption does not lose."""
        return sum(shard.rows for shard in self._shards)

    @property
    def rows_appended(self) -> int:
        """``rows_written`` plus the rows still in memory."""
        return self.rows_written + len(self._pending_cursors)

    @property
    def cursor(self) -> Any:
        """The cursor of the last row in a complete shard, or None."""
        return self._shards[-1].cursor if self._shards else None

    def _resume(self) -> None:
        progress_file = self.partial / PROGRESS_FILE
        if progress_file.exists():
            progress = json.loads(progress_file.read_text())
            found = CacheMetadata.from_json(json.dumps(progress["metadata"]), str(progress_file))
            raise_on_other_settings(self.partial, found, self.metadata)
            if progress["rows_per_shard"] != self.rows_per_shard:
                raise CacheError(
                    f"{self.partial} was started with dump.rows_per_shard="
                    f"{progress['rows_per_shard']}, not {self.rows_per_shard}; use that number, "
                    "delete the folder or change dump.cache_dir"
                )
            for shard in found.shards:
                problem = shard_problem(self.partial, shard, with_hash=True)
                if problem:
                    # Shards contain consecutive rows: those after a damaged one are dumped again.
                    logging.getLogger(__name__).warning(
                        "%s: %s; the dump resumes from there", self.partial, problem
                    )
                    break
                self._shards.append(shard)
        # Files left by a kill between two renames must not stay in the finished cache.
        known = {shard.file for shard in self._shards}
        for path in [*self.partial.glob("*.tmp"), *self.partial.glob("shard-*.safetensors")]:
            if path.name not in known:
                path.unlink()

    def append(self, rows: Rows, cursors: Sequence[Any]) -> None:
        """Appends rows, and writes every shard that becomes full.

        Args:
          rows: N rows; activations are stored as ``metadata.dtype``.
          cursors: N JSON values (for example document indices), one for each row.

        Raises:
          ValueError: rows do not match the metadata, or activations are not finite.
          OSError: the disk is full; complete shards are safe, and a new writer resumes after them.
        """
        self._raise_if_closed()
        with np.errstate(over="ignore"):  # reported below, with the rows
            stored_ND = rows.activations_ND.astype(ACTIVATION_DTYPES[self.metadata.dtype])
        rows = dataclasses.replace(rows, activations_ND=stored_ND)
        problems = list(_row_problems(rows, self.metadata))
        if len(cursors) != len(rows):
            problems.append(f"{len(cursors)} cursors for {len(rows)} rows")
        if problems:
            raise ValueError("; ".join(problems))
        self._pending.append(rows)
        self._pending_cursors.extend(cursors)
        if len(self._pending_cursors) >= self.rows_per_shard:
            self._write_full_shards()

    def finish(self) -> CacheMetadata:
        """Writes the rows still in memory and ``metadata.json``, then renames the folder.

        Raises:
          CacheError: there are no rows.
          OSError: the disk is full.
        """
        self._raise_if_closed()
        if not self.rows_appended:
            raise CacheError(f"{self.folder}: no rows; is the corpus empty or its texts too short?")
        shards = list(self._shards)
        if self._pending_cursors:
            # Not recorded in progress.json: a resumed dump must not continue after a short shard.
            rows = Rows.concatenate(self._pending)
            shards.append(self._write_shard(rows, self._pending_cursors[-1]))
        finished = dataclasses.replace(
            self.metadata, n_rows=sum(shard.rows for shard in shards), shards=tuple(shards)
        )
        self._write(METADATA_FILE, [finished.to_json().encode()])
        self._closed = True
        os.rename(self.partial, self.folder)
        sync_folder(self.folder.parent)
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
        return finished

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError(
                "this CacheWriter is finished or has failed; create a new one, which resumes after "
                "the last complete shard"
            )

    def _write_full_shards(self) -> None:
        rows = Rows.concatenate(self._pending)
        for start in range(0, len(rows) - self.rows_per_shard + 1, self.rows_per_shard):
            end = start + self.rows_per_shard
            shard = self._write_shard(rows.take(slice(start, end)), self._pending_cursors[end - 1])
            self._write_progress([*self._shards, shard])
            self._shards.append(shard)
        n_left = len(rows) % self.rows_per_shard
        rest = rows.take(slice(len(rows) - n_left, None))
        # A copy: a view would keep the whole batch in memory.
        self._pending = [Rows.concatenate([rest])] if n_left else []
        self._pending_cursors = self._pending_cursors[len(rows) - n_left :]

    def _write_shard(self, rows: Rows, cursor: Any) -> Shard:
        name = f"shard-{len(self._shards):05d}.safetensors"
        cursor = json.loads(json.dumps(cursor, default=to_plain))
        n_bytes, sha256 = self._write(name, shard_chunks(rows))
        return Shard(file=name, rows=len(rows), n_bytes=n_bytes, sha256=sha256, cursor=cursor)

    def _write_progress(self, shards: Sequence[Shard]) -> None:
        metadata = dataclasses.replace(
            self.metadata, n_rows=sum(shard.rows for shard in shards), shards=tuple(shards)
        )
        progress = {
            "rows_per_shard": self.rows_per_shard,
            "cursor": shards[-1].cursor,
            "metadata": json.loads(metadata.to_json()),
        }
        self._write(PROGRESS_FILE, [json.dumps(progress, indent=1).encode()])

    def _write(self, name: str, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
        try:
            return write_atomically(self.partial / name, chunks)
        except OSError as error:
            self._closed = True
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"no space left for {self.partial / name}: {self.rows_written} rows in "
                f"{len(self._shards)} shards are safe; free some space and run the same command "
                "again to resume",
            ) from error


def _row_problems(rows: Rows, metadata: CacheMetadata) -> Iterable[str]:
    if rows.activations_ND.shape[1] != metadata.d_model:
        yield f"activations are {rows.activations_ND.shape[1]} wide, d_model={metadata.d_model}"
    if rows.tokens_NS.shape[1] != metadata.seq_len:
        yield f"contexts are {rows.tokens_NS.shape[1]} long, dump.seq_len={metadata.seq_len}"
    outside = (rows.positions_N < 0) | (rows.positions_N >= rows.lengths_N)
    if outside.any():
        yield f"{outside.sum()} rows have a position outside their context"
    if (rows.lengths_N > rows.tokens_NS.shape[1]).any():
        yield "lengths exceed the context"
    finite_N = np.isfinite(rows.activations_ND).all(axis=1)
    if not finite_N.all():
        yield (
            f"{(~finite_N).sum()} rows have activations that are not finite; run the model in "
            "float32 or bfloat16"
        )
