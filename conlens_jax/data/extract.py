"""Corpus → activation cache: read documents, run M up to block L, store rows.

A row is one position of one document. The positions depend only on the seed and the document, and
a resumed dump forms the same batches, so it ends with the same bytes as an uninterrupted one.

With several processes each reads the whole corpus, puts its part of a batch of documents on its own
devices, and receives the rows of all; only the first process writes them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from conlens_jax.config import DumpConfig, ExperimentConfig
from conlens_jax.config.seeds import numpy_seed
from conlens_jax.corpora.corpus import Corpus, CorpusError, Document
from conlens_jax.corpora.duplicates import Tally
from conlens_jax.corpora.first_tokens import first_tokens
from conlens_jax.data.batches import pad_tokens
from conlens_jax.data.cache import ActivationCache
from conlens_jax.data.cache_metadata import CacheMetadata
from conlens_jax.data.model_documents import open_texts
from conlens_jax.data.rows import Rows
from conlens_jax.data.shared_writer import SharedWriter
from conlens_jax.data.targets.opening import open_targets, target_settings
from conlens_jax.data.targets.protocol import NextTokens, Targets, filled
from conlens_jax.files.paths import local_path
from conlens_jax.lens.original import capture, capture_and_predict
from conlens_jax.lens.spec import LensSpec
from conlens_jax.models.model import LanguageModel
from conlens_jax.parallel.mesh import batch_sharding, check_batch
from conlens_jax.parallel.preemption import Preempted, watching_for_sigterm
from conlens_jax.parallel.processes import (
    broadcast_from_first,
    check_same,
    local_rows,
    on_devices,
    to_host,
)
from conlens_jax.tracking.console import Console

TEST = "test"
"""The held-out documents that validation does not use."""
_DOCUMENTS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 1 << 22


def dump_activations(
    config: ExperimentConfig, model: LanguageModel, spec: LensSpec, mesh: Mesh, console: Console
) -> Path:
    """Writes ``train``, ``validation`` and, if it has rows, ``test`` in ``dump.cache_dir``; resumes
    an interrupted dump.

    Raises:
      ValueError: settings do not fit, the corpus has no usable document, or the cache already
        exists with other settings.
      OSError: the disk is full; complete shards are safe.
      Preempted: SIGTERM; complete shards are safe.
    """
    check_batch("dump.batch_size", config.dump.batch_size, mesh)
    # First: it may refuse the settings, and the model may have to write the corpus.
    targets = open_targets(config, model, spec, mesh, lambda: extractor("train").contexts())
    corpus = open_texts(config.corpus, model, mesh, console)
    for note in corpus.notes:
        console.line("dump", note=note)
    root = local_path(config.dump.cache_dir)
    extractor = functools.partial(Extractor, config.dump, model, spec, mesh, corpus)
    wanted = {"train": config.dump.n_samples, "validation": config.dump.n_validation_samples}
    if config.dump.n_test_samples:
        wanted[TEST] = config.dump.n_test_samples
    with watching_for_sigterm(f"the cache {root} is complete; the same command continues") as stops:
        for split, count in wanted.items():
            metadata = _metadata(config, model, corpus, split, targets)
            writer = SharedWriter(root / split, metadata, config.dump.rows_per_shard)
            if writer.complete:
                console.line("dump", split=split, found=root / split)
                continue
            first = _documents_of(root / "validation") if split == TEST else 0
            _dump_split(extractor(split, targets, first), writer, count, console, stops)
    return root


def _documents_of(folder: Path) -> int:
    """The number of the document after the last one of a cache, for all processes."""
    last = lambda: max(
        int(places.documents_N.max())
        for places in ActivationCache.open(folder, verify="sizes").places()
    )
    return broadcast_from_first(last) + 1


def _metadata(
    config: ExperimentConfig,
    model: LanguageModel,
    corpus: Corpus,
    split: str,
    targets: Targets | None,
) -> CacheMetadata:
    settings = dataclasses.asdict(config.dump)
    settings["add_bos"] = model.tokenizer.adds_bos(config.dump.add_bos)
    for name in ("cache_dir", "seq_len", "dtype", "seed", "rows_per_shard"):
        settings.pop(name)  # recorded separately, or without influence on the rows
    if split != TEST:
        settings.pop("n_test_samples")
    return CacheMetadata(
        model_id=model.model_id,
        weights_hash=model.weights_hash,
        tokenizer_hash=model.tokenizer.fingerprint,
        layer=config.model.layer,
        d_model=model.config.d_model,
        seq_len=config.dump.seq_len,
        dtype=config.dump.dtype,
        corpus=corpus.description(),
        split=split,
        dump=settings,
        seed=config.dump.seed,
        target={
            **target_settings(config.target, config.lens),
            **(targets.content if targets else {}),
        },
    )


def _dump_split(
    extractor: Extractor,
    writer: SharedWriter,
    wanted: int,
    console: Console,
    stops: Callable[[], bool],
) -> None:
    started, before = time.time(), writer.rows_before
    split = extractor.split
    if before:
        console.line("dump", split=split, resumed_after=before)
    with console.progress(wanted, f"dump {split}", initial=before) as progress:
        for rows, cursors in extractor.batches(writer.cursor):
            room = wanted - writer.rows_appended
            writer.append(rows.take(slice(room)), cursors[:room])
            rate = (writer.rows_appended - before) / (time.time() - started)
            progress.update(min(len(rows), room), samples_per_s=rate)
            if writer.rows_appended >= wanted:
                break
            if stops():
                raise Preempted(
                    f"SIGTERM: the complete shards of {writer.folder}.partial are safe; the same "
                    "command resumes after them"
                )
    if writer.rows_appended == 0:
        raise CorpusError(extractor.nothing_message())
    if writer.rows_appended < wanted:
        console.line(
            "dump",
            split=split,
            note=f"the corpus has only {writer.rows_appended} of {wanted} rows",
        )
    writer.finish()
    console.line(
        "dump",
        split=split,
        rows=writer.rows_appended,
        too_short=extractor.too_short,
        **extractor.copies(),
        **extractor.incomplete(),
        samples_per_s=(writer.rows_appended - before) / max(time.time() - started, 1e-9),
        folder=writer.folder,
    )
    if extractor.targets and (speed := extractor.targets.speed()):
        console.line("targets", split=split, **speed)


class Extractor:
    """Turns the documents of a split, from number ``first``, into batches of rows."""

    def __init__(
        self,
        config: DumpConfig,
        model: LanguageModel,
        spec: LensSpec,
        mesh: Mesh,
        corpus: Corpus,
        split: str,
        targets: Targets | None = None,
        first: int = 0,
    ):
        self._first = first
        self.config, self.model, self.split, self.corpus = config, model, split, corpus
        self.targets, self.spec = targets, spec
        self.sharding = batch_sharding(mesh)
        self.too_short = self.read = 0
        self._without_target = self._cut = 0
        self.tally = Tally()
        self._n_next = 0 if targets is None else targets.n_next
        self._capture = functools.partial(_capture_at, spec=spec, n_next=self._n_next)

    def batches(self, cursor: Any, with_targets: bool = True) -> Iterator[tuple[Rows, list[Any]]]:
        """Rows after ``cursor``, which is [first document of the batch, row in the batch]."""
        start, skip = (cursor[0], cursor[1] + 1) if cursor else (self._first, 0)
        documents = self._usable(start)
        while batch := list(itertools.islice(documents, self.config.batch_size)):
            rows, next_tokens = self._captured(*self._draw(batch))
            if with_targets:
                rows = self._with_targets(rows, next_tokens)
            cursors = [[batch[0][0], number] for number in range(len(rows))]
            yield rows.take(slice(skip, None)), cursors[skip:]
            skip = 0

    def tokens_of(self, wanted: int) -> Iterator[Rows]:
        """The first ``wanted`` rows with their targets, by batches of documents, with activations
        of width 0: M runs only if the targets need it."""
        documents, room = self._usable(self._first), wanted
        while room > 0 and (batch := list(itertools.islice(documents, self.config.batch_size))):
            rows, row_of = self._draw(batch)
            next_tokens = self._captured(rows, row_of)[1] if self._n_next else None
            rows = self._with_targets(rows, next_tokens).take(slice(room))
            room -= len(rows)
            yield rows

    def contexts(self) -> Iterator[list[int]]:
        """The tokens of each document's context."""
        return (tokens[: self.config.seq_len] for _, tokens in self._encoded(self._first))

    def captured(self, wanted: int, with_targets: bool = True) -> Iterator[Rows]:
        """The first ``wanted`` rows as the dump writes them."""
        room = wanted
        for rows, _ in self.batches(None, with_targets):
            yield rows.take(slice(room))
            room -= len(rows)
            if room <= 0:
                return

    def copies(self) -> dict[str, int]:
        """For the log: duplicate texts among all documents read so far, in both splits, and how
        many were left out because the other split has the same text."""
        return {"duplicates": self.tally.copies, "duplicates_left_out": self.tally.left_out}

    def incomplete(self) -> dict[str, int]:
        """For the log: documents without a target at any possible position, and targets that were
        cut at ``lens.text_len``; empty if there are none."""
        counts = {"without_target": self._without_target, "targets_cut": self._cut}
        return {name: count for name, count in counts.items() if count}

    @property
    def _corpus_split(self) -> str:
        return "validation" if self.split == TEST else self.split

    def nothing_message(self) -> str:
        if not self.read and self._first:
            return (
                f"dump.n_test_samples={self.config.n_test_samples}: dump.n_validation_samples="
                f"{self.config.n_validation_samples} leaves no held-out document of corpus "
                f"{self.corpus.name!r} for the test split; lower it, or raise "
                "corpus.validation_fraction or corpus.n_documents"
            )
        return (
            f"corpus.path={self.corpus.name!r}: none of the {self.read} documents in the "
            f"{self.split} split is long enough: a row needs dump.min_position="
            f"{self.config.min_position} + 1 + dump.after={self.config.after} tokens; lower "
            "dump.min_position or choose longer documents"
        )

    def _usable(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """Index and context tokens of each document that has at least one row."""
        config = self.config
        for index, tokens in self._encoded(start):
            self.read += 1
            tokens = tokens[: config.seq_len]
            if len(tokens) <= config.min_position + config.after:
                self.too_short += 1
            elif not len(self._possible(index, len(tokens))):
                self._without_target += 1
            else:
                yield index, tokens

    def _encoded(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """Index and tokens of each document; at least those of its context."""
        config = self.config
        encode = functools.partial(self.model.tokenizer.encode_batch, add_bos=config.add_bos)
        for chunk in _chunks(self.corpus.documents(self._corpus_split, start, self.tally)):
            texts = [document.text for document in chunk]
            encoded = first_tokens(encode, texts, config.seq_len)
            for document, tokens in zip(chunk, encoded, strict=True):
                yield document.index, tokens

    def _draw(self, batch: list[tuple[int, list[int]]]) -> tuple[Rows, np.ndarray]:
        """Rows without activations, and the index of each row's document in the batch."""
        config = self.config
        tokens_BS, lengths_B = pad_tokens(
            [tokens for _, tokens in batch], config.seq_len, self.model.tokenizer.pad_id
        )
        chosen = [
            self._positions(document, length)
            for (document, _), length in zip(batch, lengths_B, strict=True)
        ]
        row_of = np.repeat(np.arange(len(batch)), [len(positions) for positions in chosen])
        rows = Rows(
            activations_ND=np.zeros((len(row_of), 0), np.float32),
            tokens_NS=tokens_BS[row_of],
            positions_N=np.concatenate(chosen).astype(np.int32),
            lengths_N=lengths_B[row_of],
            documents_N=np.asarray([document for document, _ in batch], np.int64)[row_of],
        )
        return rows, row_of

    def _captured(self, rows: Rows, row_of: np.ndarray) -> tuple[Rows, NextTokens | None]:
        """The rows of a batch of documents with their activations, and M's next tokens if the
        targets need them; M reads each document once."""
        size, per_document = self.config.batch_size, self.config.positions_per_sequence
        documents, first = np.unique(row_of, return_index=True)
        number = np.arange(len(row_of)) - first[row_of]
        positions_Bk = np.zeros((size, per_document), np.int32)
        positions_Bk[row_of, number] = rows.positions_N
        padding = ((0, size - len(documents)), (0, 0))
        tokens_BS = np.pad(rows.tokens_NS[first], padding)
        lengths_B = np.pad(rows.lengths_N[first], padding[0])
        # Otherwise tokens would not belong to their activations.
        check_same("text in the corpus", tokens_BS.tobytes())
        here = local_rows(self.sharding, size)
        captured = self._capture(
            self.model.params,
            *(
                on_devices(array[here], self.sharding, size)
                for array in (tokens_BS, lengths_B, positions_Bk)
            ),
        )
        activations_ND, *next_tokens = (array[row_of, number] for array in to_host(captured))
        rows = dataclasses.replace(rows, activations_ND=activations_ND)
        return rows, NextTokens(*next_tokens) if next_tokens else None

    def _with_targets(self, rows: Rows, next_tokens: NextTokens | None) -> Rows:
        if self.targets is None:
            return rows
        texts = self.targets.texts(rows, next_tokens)
        self._cut += sum(len(text) >= self.spec.text_len for text in texts)
        targets_NT = filled(texts, self.spec.text_len, self.spec.end)
        return dataclasses.replace(rows, targets_NT=targets_NT)

    def _positions(self, document: int, length: int) -> np.ndarray:
        """Distinct random positions among those that are possible, ascending."""
        config = self.config
        possible = self._possible(document, length)
        rng = np.random.default_rng([numpy_seed(config.seed), document])
        count = min(config.positions_per_sequence, len(possible))
        return np.sort(rng.choice(possible, count, replace=False))

    def _possible(self, document: int, length: int) -> np.ndarray:
        """The positions in the valid range that have a target."""
        config = self.config
        last = length - 1 - config.after
        if config.max_position:
            last = min(last, config.max_position)
        possible = np.arange(config.min_position, last + 1)
        return possible if self.targets is None else self.targets.positions(document, possible)


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents to tokenise at once, limited by their number and total length."""
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if len(chunk) == _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@functools.partial(jax.jit, static_argnames=("spec", "n_next"))
def _capture_at(original, tokens_BS, lengths_B, positions_Bk, *, spec, n_next):
    """The activations at k positions of each document, and with ``n_next`` the ids and
    probabilities of M's likeliest next tokens there."""
    mask_BS = np.arange(tokens_BS.shape[1])[None] < lengths_B[:, None]
    if n_next:
        x_BkD, ids_Bkn, probabilities_Bkn = capture_and_predict(
            original, tokens_BS, mask_BS, positions_Bk, count=n_next, spec=spec
        )
        return x_BkD.astype(np.float32), ids_Bkn, probabilities_Bkn
    x_BSD = capture(original, tokens_BS, mask_BS, spec=spec)
    return (x_BSD[np.arange(tokens_BS.shape[0])[:, None], positions_Bk].astype(np.float32),)
