"""Separate encoders that a lens is compared with: they are trained on true text only, never the
decoder's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from conlens_jax.config import WarmConfig
from conlens_jax.data.rows import Places, Rows, RowSource
from conlens_jax.data.stream import CapturedRows, TokenStream
from conlens_jax.data.targets.words import next_words_only
from conlens_jax.lens.spec import init_lens
from conlens_jax.models.param_table import Params
from conlens_jax.tracking.wandb_run import WandbRun
from conlens_jax.training.loop import run_stage
from conlens_jax.training.run import Run, placed
from conlens_jax.training.run_folder import AUDIT, NEXT_WORDS
from conlens_jax.training.session import Session, training_rows
from conlens_jax.training.state import Stage

RowsOrPlaces = TypeVar("RowsOrPlaces", Rows, Places)


def train_auditor(session: Session, run_folder: Path) -> Params:
    """Trains an encoder on true windows of the corpus, or loads the one in ``<run>/audit``.

    It starts as the lens's encoder did, as a clone of M (from random weights it would first have to
    learn the language). Its rows are in another order (``audit_seed``), its windows start up to
    ``audit_shift`` tokens before or after those of the warm start, and all prefixes of a window
    have the same weight, so that it learns to read texts of 1 to T tokens.

    Returns:
      ``{"encoder": …}``, to replace a lens's own.
    """
    config, (train, validation) = session.config, session.caches
    steps, seed = config.evaluate.audit_steps, config.evaluate.audit_seed
    shift = config.evaluate.audit_shift
    if shift:
        if isinstance(train, TokenStream):
            # The step would capture the activation at the shifted position.
            train = CapturedRows(training_rows(train, steps * config.warm.batch_size))
        train = ShiftedWindows(train, config.warm, shift, seed)
    folder = run_folder / AUDIT / f"seed{seed}-steps{steps}-shift{shift}"
    return _train_reader(session, folder, train, validation)


def train_next_words_reader(session: Session, run_folder: Path, separator: int) -> Params:
    """Trains an encoder on the first parts of targets of words alone, M's own likeliest next
    tokens, or loads the one in ``<run>/next_words``. Start, order, steps and loss are those of
    :func:`train_auditor`, so that the two differ in nothing but their texts.

    Returns:
      ``{"encoder": …}``, to replace a lens's own.
    """
    config, end = session.config.evaluate, session.spec.end
    train, validation = (NextWords(source, separator, end) for source in session.caches)
    folder = run_folder / NEXT_WORDS / f"seed{config.audit_seed}-steps{config.audit_steps}"
    return _train_reader(session, folder, train, validation)


def _train_reader(
    session: Session, folder: Path, train: RowSource, validation: RowSource
) -> Params:
    config = session.config
    steps, seed = config.evaluate.audit_steps, config.evaluate.audit_seed
    text_len = session.spec.text_len
    # Prefixes cannot be read in one pass if the encoder's prompt has a part after the text.
    share = 0.0 if session.spec.encoder_right else 1 - 1 / text_len
    loss = dataclasses.replace(session.objective.loss, prefix_share=share)
    alone = dataclasses.replace(
        session,
        config=dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)),
        objective=dataclasses.replace(session.objective, loss=loss),
    )
    reference = session.reference
    trainable, frozen = init_lens(
        session.model.params, session.spec, reference.mean_D, reference.scale, seed=seed
    )
    encoder = placed({"decoder": {}, "encoder": trainable["encoder"]}, session)
    tracker = WandbRun(config.wandb, folder, {}, enabled=False)
    run = Run(alone, folder, train, validation, reference, session.measurer(), tracker)
    stage = Stage("audit", steps, config.warm.batch_size, config.warm.optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    return {"encoder": run_stage(run, stage, encoder, frozen)["encoder"]}


class NextWords:
    """Rows whose targets are the first parts of targets of words."""

    def __init__(self, source: RowSource, separator: int, end: int):
        self._source, self._separator, self._end = source, separator, end

    def __len__(self) -> int:
        return len(self._source)

    def rows(self, indices: np.ndarray | Sequence[int]) -> Rows:
        """The rows at ``indices``, in that order."""
        rows = self._source.rows(indices)
        targets_NT = next_words_only(rows.targets_NT, self._separator, self._end)
        return dataclasses.replace(rows, targets_NT=targets_NT)

    def places(self) -> Iterator[Places]:
        """Positions, lengths and documents of all rows."""
        return self._source.places()


class ShiftedWindows:
    """Rows whose position is shifted within the document while the activation stays: the window is
    true text near the activation's position.

    Each row's shift is drawn once, uniformly from those of up to ``shift`` tokens in either
    direction that keep the whole window inside the document.
    """

    def __init__(self, source: RowSource, window: WarmConfig, shift: int, seed: int):
        self._source, self._window, self._shift = source, window, shift
        self._draws_N = np.random.default_rng(seed).random(len(source))

    def __len__(self) -> int:
        return len(self._source)

    def rows(self, indices: np.ndarray | Sequence[int]) -> Rows:
        """The rows at ``indices``, in that order."""
        return self._shifted(self._source.rows(indices), self._draws_N[indices])

    def places(self) -> Iterator[Places]:
        """Positions (the shifted ones), lengths and documents of all rows."""
        start = 0
        for piece in self._source.places():
            stop = start + len(piece.positions_N)
            yield self._shifted(piece, self._draws_N[start:stop])
            start = stop

    def _shifted(self, rows: RowsOrPlaces, draws_N: np.ndarray) -> RowsOrPlaces:
        window, shift, at_N = self._window, self._shift, rows.positions_N
        before_N = np.clip(at_N - (window.before - 1), 0, shift)
        after_N = np.clip(rows.lengths_N - 1 - window.after - at_N, 0, shift)
        shifts_N = np.floor(draws_N * (before_N + after_N + 1)) - before_N
        return dataclasses.replace(rows, positions_N=at_N + shifts_N.astype(at_N.dtype))
