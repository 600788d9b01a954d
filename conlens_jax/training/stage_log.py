"""The records of a stage: files in the run folder, and the same in W&B."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conlens_jax.tracking.records import MetricsFile
from conlens_jax.tracking.wandb_run import WandbRun
from conlens_jax.training.validation import Sample

METRICS, SAMPLES, HISTOGRAMS = "metrics.jsonl", "samples.jsonl", "histograms.jsonl"
BINS = 32
# Fixed ranges of bounded quantities, so that histograms of two steps have the same bins.
_RANGES = {"cos": (-1.0, 1.0)}


class StageLog:
    """Three files of JSON lines, each line with its step and stage, and W&B under ``<stage>/``.

    ===================  =========================================================================
    ``metrics.jsonl``    numbers: losses and validation scores
    ``samples.jsonl``    explanations to read: context, text, its tokens, cos, KL, predictions
    ``histograms.jsonl`` distributions over the validation rows (counts and bin edges), and the
                         shares of the most common tokens of the texts
    ===================  =========================================================================

    Args:
      folder: of the run, or of a stage with its own folder.
      stage: its name.
      enabled: False writes nothing; for all processes but the first.
    """

    def __init__(self, folder: Path, stage: str, tracker: WandbRun, *, enabled: bool = True):
        self._files = {
            name: MetricsFile(folder / name, enabled=enabled)
            for name in (METRICS, SAMPLES, HISTOGRAMS)
        }
        self._stage, self._tracker = stage, tracker

    def truncate_after(self, step: int) -> None:
        """Drops the records after ``step``, which a resumed run writes again."""
        for file in self._files.values():
            file.truncate_after(step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars by name."""
        self._write(METRICS, step, **values)
        self._tracker.log({self._named(name): value for name, value in values.items()}, step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Explanations of some rows; in W&B a table."""
        records = [dataclasses.asdict(sample) for sample in samples]
        for record in records:
            self._write(SAMPLES, step, **record)
        if records:
            rows = [list(record.values()) for record in records]
            self._tracker.table(self._named("samples"), list(records[0]), rows, step)

    def distributions(
        self,
        step: int,
        values: Mapping[str, np.ndarray],
        token_shares: Sequence[tuple[str, float]],
    ) -> None:
        """Histograms of per-row values [N] by name, such as ``"cos_sampled"``, and the shares of
        the most common tokens of the texts."""
        histograms = {name: histogram(name, row_values) for name, row_values in values.items()}
        plain = {
            name: {"counts": counts, "edges": edges} for name, (counts, edges) in histograms.items()
        }
        self._write(HISTOGRAMS, step, **plain, token_shares=dict(token_shares))
        for name, (counts, edges) in histograms.items():
            self._tracker.histogram(self._named(name), counts, edges, step)
        if token_shares:
            self._tracker.table(self._named("tokens"), ["token", "share"], list(token_shares), step)

    def _write(self, file: str, step: int, **values: Any) -> None:
        self._files[file].write(step, stage=self._stage, **values)

    def _named(self, name: str) -> str:
        return f"{self._stage}/{name}"


def histogram(name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts [BINS] and edges [BINS + 1] of the finite values; the first word of the name selects
    the range."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    return np.histogram(finite, BINS, _RANGES.get(name.partition("_")[0]))
