"""Rows directly from the corpus, without activations on disk (``data.source=stream``).

They are the rows that a dump with the same settings would write, in the same order. Only tokens,
positions and targets are kept; activations are captured when they are used
(:func:`conlens_jax.lens.batch.with_activations`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from conlens_jax.config import ExperimentConfig
from conlens_jax.corpora.corpus import CorpusError
from conlens_jax.data.extract import Extractor
from conlens_jax.data.model_documents import open_texts
from conlens_jax.data.rows import Places, Rows, checked_indices
from conlens_jax.data.targets.opening import open_targets
from conlens_jax.lens.spec import LensSpec
from conlens_jax.models.model import LanguageModel
from conlens_jax.tracking.console import Console


class TokenStream:
    """Training rows with activations of width 0; otherwise like an activation cache.

    Each document's context is stored once and shared by its rows. Targets are made here, by the
    batches of the dump: they are its targets to the last token.
    """

    def __init__(self, extractor: Extractor, wanted: int, console: Console):
        self._extractor = extractor
        parts = []
        # Without targets there is nothing to wait for.
        shown = console if extractor.targets else Console(enabled=False)
        with shown.progress(wanted, "targets") as progress:
            for part in extractor.tokens_of(wanted):
                parts.append(part)
                progress.update(len(part))
        if not parts:
            raise CorpusError(extractor.nothing_message())
        contexts, others, documents = [], [], 0
        for part in parts:
            _, first, of_row = np.unique(part.documents_N, return_index=True, return_inverse=True)
            contexts.append((part.tokens_NS[first], part.lengths_N[first], part.documents_N[first]))
            others.append((of_row + documents, part.positions_N))
            documents += len(first)
        self._tokens_GS, self._lengths_G, self._documents_G = map(
            np.concatenate, zip(*contexts, strict=True)
        )
        self._document_of_N, self._positions_N = map(np.concatenate, zip(*others, strict=True))
        self._targets_NT = np.concatenate([part.targets_NT for part in parts])

    def __len__(self) -> int:
        return len(self._positions_N)

    def rows(self, indices: np.ndarray | Sequence[int]) -> Rows:
        """The rows at ``indices``, in that order, without activations."""
        indices = checked_indices(indices, len(self))
        documents = self._document_of_N[indices]
        return Rows(
            activations_ND=np.zeros((len(indices), 0), np.float32),
            tokens_NS=self._tokens_GS[documents],
            positions_N=self._positions_N[indices],
            lengths_N=self._lengths_G[documents],
            documents_N=self._documents_G[documents],
            targets_NT=self._targets_NT[indices],
        )

    def places(self) -> Iterator[Places]:
        """Positions, lengths and documents of all rows."""
        documents = self._document_of_N
        yield Places(self._positions_N, self._lengths_G[documents], self._documents_G[documents])

    def contexts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens [G, S] and lengths [G] of the contexts of all rows."""
        yield self._tokens_GS, self._lengths_G

    def captured(self, count: int) -> Rows:
        """The first ``count`` rows with their activations."""
        rows = Rows.concatenate(list(self._extractor.captured(count, with_targets=False)))
        return dataclasses.replace(rows, targets_NT=self._targets_NT[: len(rows)])


class CapturedRows:
    """Rows with their activations, in memory."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: np.ndarray | Sequence[int]) -> Rows:
        """The rows at ``indices``, in that order."""
        return self._rows.take(checked_indices(indices, len(self)))

    def places(self) -> Iterator[Places]:
        """Positions, lengths and documents of all rows."""
        yield Places.of(self._rows)


def open_stream(
    config: ExperimentConfig,
    model: LanguageModel,
    spec: LensSpec,
    mesh: Mesh,
    console: Console | None = None,
) -> tuple[TokenStream, CapturedRows]:
    """The training and validation rows for the settings in ``dump``.

    The number of duplicate texts is printed to ``console``.

    Raises:
      ValueError: a split of the corpus has no usable document, or as
        :func:`~conlens_jax.data.targets.opening.open_targets`.
    """
    console = console or Console(enabled=False)
    targets = open_targets(config, model, spec, mesh, lambda: extractor("train").contexts())
    corpus = open_texts(config.corpus, model, mesh, console)
    extractor = lambda split: Extractor(config.dump, model, spec, mesh, corpus, split, targets)
    held_out, reader = extractor("validation"), extractor("train")
    parts = list(held_out.captured(config.dump.n_validation_samples))
    if not parts:
        raise CorpusError(held_out.nothing_message())
    train = TokenStream(reader, config.dump.n_samples, console)
    for note in corpus.notes:
        console.line("stream", note=note)
    console.line("stream", **reader.copies(), **reader.incomplete())
    if targets:
        if speed := targets.speed():
            console.line("targets", **speed)
        targets.release()
    return train, CapturedRows(Rows.concatenate(parts))
