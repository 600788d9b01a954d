"""The activation cache: raw activations with their contexts, on disk.

A finished cache is a folder with ``metadata.json`` and equal-sized shards
``shard-00000.safetensors``, … (the last may be shorter). It is written as ``<folder>.partial`` and
renamed at the end, so a folder without that suffix is always complete. Each shard is written to a
temporary name, synced and renamed, then ``progress.json`` is updated: an interrupted dump resumes
after its last complete shard.

Activations are stored as float32 or bfloat16, never float16: the residual stream of large models
exceeds float16's range (65504).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from conlens_jax.data.cache_metadata import (
    METADATA_FILE,
    CacheError,
    CacheMetadata,
    check_metadata,
)
from conlens_jax.data.rows import Places, Rows, checked_indices
from conlens_jax.data.shard_files import map_shard, shard_problem, shard_stamp
from conlens_jax.files.paths import local_path


class ActivationCache:
    """A finished cache, created by :meth:`open`. Rows are read from memory-mapped shards."""

    def __init__(
        self, folder: Path, metadata: CacheMetadata, stamps: Sequence[tuple[int, ...] | None]
    ):
        self.folder = folder
        self.metadata = metadata
        self._ends = np.cumsum([shard.rows for shard in metadata.shards])
        self._maps: dict[int, Rows] = {}
        self._stamps = list(stamps)  # of each shard when it was verified

    @classmethod
    def open(
        cls,
        folder: str | Path,
        verify: bool | Literal["sizes"] = True,
        share: tuple[int, int] = (0, 1),
    ) -> ActivationCache:
        """Opens a finished cache.

        Args:
          folder: the folder with ``metadata.json``.
          verify: True also reads every shard and compares its sha256; ``"sizes"`` or False only
            checks that all shards exist with the right sizes.
          share: (i, n): with ``verify=True`` the work is shared by n readers; this is reader i,
            from 0, which reads every n-th shard.

        Raises:
          CacheError: there is no finished cache, its schema version is unknown, or shards are
            missing, truncated or altered (all are listed).
        """
        folder = local_path(folder)
        path = folder / METADATA_FILE
        if not path.is_file():
            partial = folder.with_name(folder.name + ".partial")
            hint = (
                "its dump was interrupted: run the same dump command again to resume it"
                if partial.is_dir()
                else "run conlens_jax.dump first or change dump.cache_dir"
            )
            raise CacheError(f"no activation cache at {folder} (no {METADATA_FILE}); {hint}")
        metadata = CacheMetadata.from_json(path.read_text(), str(path))
        stamps = [shard_stamp(folder / shard.file) for shard in metadata.shards]
        reads = lambda number: verify is True and number % share[1] == share[0]
        problems = [
            problem
            for number, shard in enumerate(metadata.shards)
            if (problem := shard_problem(folder, shard, with_hash=reads(number)))
        ]
        n_rows = sum(shard.rows for shard in metadata.shards)
        if n_rows != metadata.n_rows or not n_rows:
            problems.append(
                f"{METADATA_FILE}: n_rows={metadata.n_rows}, but its shards contain {n_rows}"
            )
        if problems:
            raise CacheError(
                f"{folder} is damaged; restore these files, or delete the folder and dump again:\n"
                + "\n".join(f"  - {problem}" for problem in problems)
            )
        return cls(folder, metadata, stamps)

    def __len__(self) -> int:
        return self.metadata.n_rows

    def rows(self, indices: np.ndarray | Sequence[int]) -> Rows:
        """The rows at ``indices``, in that order; activations are float32.

        Raises:
          ValueError: an index is outside ``0 … len − 1``.
          CacheError: a shard was truncated or altered since the cache was opened.
        """
        indices = checked_indices(indices, len(self))
        # Reading in ascending order touches every page once.
        order = np.argsort(indices, kind="stable")
        ordered = indices[order]
        shard_of = np.searchsorted(self._ends, ordered, side="right")
        parts = []
        shard_numbers = [int(number) for number in np.unique(shard_of)]
        self._check_unchanged(shard_numbers)
        for number in shard_numbers:
            first_row = self._ends[number] - self.metadata.shards[number].rows
            parts.append(self._shard(number).take(ordered[shard_of == number] - first_row))
        self._check_unchanged(shard_numbers)  # nor did they change during the read
        rows = Rows.concatenate(parts) if parts else self._shard(0).take(indices)
        rows = rows.take(np.argsort(order))
        return dataclasses.replace(rows, activations_ND=rows.activations_ND.astype(np.float32))

    def places(self) -> Iterator[Places]:
        """Positions, lengths and documents of all rows, shard by shard; nothing else is read."""
        for number in range(len(self.metadata.shards)):
            self._check_unchanged([number])
            yield Places.of(self._shard(number))

    def contexts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens [G, S] and lengths [G] of the contexts of all rows, shard by shard; that of
        consecutive rows of a document once."""
        for number in range(len(self.metadata.shards)):
            self._check_unchanged([number])
            rows = self._shard(number)
            first = np.flatnonzero(np.diff(rows.documents_N, prepend=-1))
            yield rows.tokens_NS[first], rows.lengths_N[first]

    def _check_unchanged(self, numbers: Sequence[int]) -> None:
        """Verifies again each shard whose file was modified after the cache was opened.

        A memory-mapped read beyond the end of a truncated file would kill the process, and altered
        rows would be trained on.

        Raises:
          CacheError: a shard changed.
        """
        problems = []
        for number in numbers:
            shard = self.metadata.shards[number]
            stamp = shard_stamp(self.folder / shard.file)
            # A file that was deleted stays readable while it is mapped.
            if stamp == self._stamps[number] or (stamp is None and number in self._maps):
                continue
            if problem := shard_problem(self.folder, shard, with_hash=True):
                problems.append(problem)
            else:
                self._maps.pop(number, None)  # rewritten with the same content
                self._stamps[number] = stamp
        if problems:
            raise CacheError(
                f"{self.folder} was damaged while it was read; restore these files and run the "
                "same command again, which resumes from the last checkpoint:\n"
                + "\n".join(f"  - {problem}" for problem in problems)
            )

    def _shard(self, number: int) -> Rows:
        if number not in self._maps:
            shard = self.metadata.shards[number]
            rows = map_shard(self.folder / shard.file)
            found = (len(rows), rows.activations_ND.shape[1], rows.tokens_NS.shape[1])
            stated = (shard.rows, self.metadata.d_model, self.metadata.seq_len)
            if found != stated:
                raise CacheError(
                    f"{self.folder / shard.file} has (rows, d_model, seq_len) = {found}, "
                    f"but {METADATA_FILE} has {stated}; dump again"
                )
            self._maps[number] = rows
        return self._maps[number]

    def check(self, **expected: Any) -> None:
        """Raises :class:`CacheError` if the cache is of another model, tokenizer or layer than
        expected; see :func:`check_metadata`."""
        check_metadata(self.metadata, str(self.folder), **expected)
