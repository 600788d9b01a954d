"""Activation caches of earlier public systems, read through the same interface.

Three layouts are known:

* a folder with one ``.pt`` file per sample: a dict with ``A``, ``input_ids_A``, ``token_pos_A``
  and, in most, the same with ``_prime``;
* ``.pt`` shards with lists of such dicts, with or without a ``metadata.json`` that lists them
  (several processes wrote ``rank_0/``, ``rank_1/``, …);
* the parquet files of natural-language autoencoders: ``activation_vector``, and optionally
  ``token_ids_prefix`` (the context up to and including P) with a ``<file>.nla_meta.yaml`` sidecar.

``A`` and ``A_prime`` are both activations with a context, so they become two rows. Reading is
slower than from an :class:`ActivationCache`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from conlens_jax.data.cache import ActivationCache
from conlens_jax.data.cache_metadata import (
    CacheError,
    CacheMetadata,
    check_metadata,
)
from conlens_jax.data.legacy_files import (
    TOKEN_COLUMNS,
    FilePart,
    LegacyRow,
    parquet_files,
    parquet_parts,
    pt_files,
    raise_problems,
    read_part,
    recorded_by_shards,
    recorded_by_sidecar,
)
from conlens_jax.data.rows import Places, Rows, checked_indices
from conlens_jax.files.paths import local_path


def open_cache(
    folder: str | Path,
    verify: bool | Literal["sizes"] = True,
    pad_id: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> ActivationCache | LegacyCache:
    """Opens a cache of any supported layout.

    ``pad_id`` is used only for legacy layouts, which are always read completely; ``verify`` and
    ``share`` are those of :meth:`ActivationCache.open`.

    Raises:
      CacheError: there is no cache, its layout is unknown, or it is damaged.
    """
    folder = local_path(folder)
    if pt_files(folder) or parquet_files(folder):
        return LegacyCache.open(folder, pad_id)
    return ActivationCache.open(folder, verify, share)


@dataclasses.dataclass
class _Facts:
    """Properties that all files must share, collected while reading."""

    parts: list[tuple[FilePart, int]] = dataclasses.field(default_factory=list)
    widths: dict[int, str] = dataclasses.field(default_factory=dict)  # and the first file with it
    with_tokens: set[bool] = dataclasses.field(default_factory=set)
    layers: set[int] = dataclasses.field(default_factory=set)
    seq_len: int = 0

    def add(self, part: FilePart, rows: Sequence[LegacyRow]) -> None:
        if rows:
            self.parts.append((part, len(rows)))
        for row in rows:
            self.widths.setdefault(len(row.activation_D), part.path.name)
            self.with_tokens.add(len(row.tokens) > 0)
            self.layers.add(row.layer)
            self.seq_len = max(self.seq_len, len(row.tokens))

    def problems(self) -> list[str]:
        found = []
        if len(self.widths) > 1:
            places = ", ".join(f"{width} in {name}" for width, name in self.widths.items())
            found.append(f"activations of different widths: {places}")
        if len(self.layers) > 1:
            found.append(f"activations of different layers: {sorted(self.layers)}")
        return found


class LegacyCache:
    """A legacy cache with the interface of :class:`ActivationCache`.

    ``metadata`` contains what the files record: hashes are empty, an unknown layer is -1. The
    ``.pt`` systems captured the *input* of block ``layer_idx`` (``hidden_states[layer_idx]``); that
    is the output of block ``layer_idx − 1``, the value of ``metadata.layer``. Parquet sidecars
    already count outputs of blocks.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[tuple[FilePart, int]],
        metadata: CacheMetadata,
        pad_id: int | None,
        has_contexts: bool,
    ):
        self.folder = folder
        self.metadata = metadata
        self.has_contexts = has_contexts
        self._parts = [part for part, _ in parts]
        self._ends = np.cumsum([n_rows for _, n_rows in parts])
        self._pad_id = pad_id
        self._read = functools.lru_cache(maxsize=2)(functools.partial(read_part, pad_id=pad_id))

    @classmethod
    def open(cls, folder: str | Path, pad_id: int | None = None) -> LegacyCache:
        """Reads every file once, to count its rows and check them.

        Args:
          folder: the folder, or one parquet file.
          pad_id: the padding token of the dump: trailing ones after P are not counted in
            ``lengths_N``. Without it every stored token counts as text.

        Raises:
          CacheError: no file has a supported layout; or files have missing keys, activations that
            are not finite (float16 overflows in large models), or different widths (all listed).
        """
        folder = local_path(folder)
        paths = pt_files(folder)
        if paths:
            recorded = recorded_by_shards(folder, paths)
            candidates = [FilePart(path) for path in paths]
        else:
            paths = parquet_files(folder)
            recorded = recorded_by_sidecar(paths[0]) if paths else {}
            candidates = list(parquet_parts(paths))
        facts, problems = _Facts(), []
        if recorded.get("d_model"):
            facts.widths[int(recorded["d_model"])] = "the sidecar"
        for part in candidates:
            try:
                facts.add(part, read_part(part, pad_id))
            except CacheError as error:
                problems.append(str(error))
        problems += facts.problems()
        if not facts.parts and not problems:
            problems.append("no .pt or .parquet file with rows")
        raise_problems(folder, problems)
        layer = recorded.get("layer")
        if layer is None:
            layer = facts.layers.pop() if len(facts.layers) == 1 else -1
        metadata = CacheMetadata(
            model_id=str(recorded.get("model") or ""),
            weights_hash="",
            tokenizer_hash="",
            layer=int(layer),
            d_model=next(iter(facts.widths)),
            seq_len=max(facts.seq_len, 1),
            dtype="float32",
            corpus={"name": str(recorded.get("corpus") or "")},
            split=str(recorded.get("split") or ""),
            dump={"source": folder.name},
            seed=int(recorded.get("seed") or 0),
            n_rows=sum(n_rows for _, n_rows in facts.parts),
        )
        has_contexts = facts.with_tokens == {True}
        return cls(folder, facts.parts, metadata, pad_id, has_contexts)

    def __len__(self) -> int:
        return self.metadata.n_rows

    def rows(self, indices: np.ndarray | Sequence[int]) -> Rows:
        """The rows at ``indices``, in that order; contexts padded to ``metadata.seq_len``.

        Rows of files without tokens have ``lengths_N = 0``.

        Raises:
          ValueError: an index outside ``0 … len − 1``.
        """
        indices = checked_indices(indices, len(self))
        found: dict[int, LegacyRow] = {}
        for index in np.unique(indices):
            number = int(np.searchsorted(self._ends, index, side="right"))
            part = self._read(self._parts[number])
            # Counted from the end of the part: _ends does not have the start of the first part.
            found[int(index)] = part[int(index - self._ends[number])]
        rows = [found[int(index)] for index in indices]
        tokens_NS = np.full((len(rows), self.metadata.seq_len), self._pad_id or 0, np.int32)
        activations_ND = np.zeros((len(rows), self.metadata.d_model), np.float32)
        for number, row in enumerate(rows):
            activations_ND[number] = row.activation_D
            tokens_NS[number, : len(row.tokens)] = row.tokens
        return Rows(
            activations_ND,
            tokens_NS,
            np.array([row.position for row in rows], np.int32),
            np.array([len(row.tokens) for row in rows], np.int32),
            np.array([row.document for row in rows], np.int64),
        )

    def places(self) -> Iterator[Places]:
        """Like :meth:`ActivationCache.places`, but every row is read completely."""
        for start, end in itertools.pairwise([0, *self._ends]):
            yield Places.of(self.rows(np.arange(start, end)))

    def check(self, **expected: Any) -> None:
        """Like :meth:`ActivationCache.check`; what the files do not record is not compared.

        Raises:
          CacheError: there is a mismatch, or the files have no contexts.
        """
        if not self.has_contexts:
            raise CacheError(
                f"{self.folder} has no token columns ({', '.join(TOKEN_COLUMNS)}): a lens needs "
                "the context of every activation; dump again from the texts"
            )
        check_metadata(self.metadata, str(self.folder), **expected)
