"""Running a lens over rows of a cache: its texts, its reconstructions, and what M does with them.

Two passes. The first explains every row and reads the explanation back; the second puts candidate
vectors into M at P and compares its predictions with the true ones. Every quantity that a metric
needs is one number per row, so that the bootstrap never runs the model again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from conlens_jax.data.device_batches import make_batch
from conlens_jax.data.rows import Rows
from conlens_jax.lens.batch import Batch, filled
from conlens_jax.lens.spec import LensSpec
from conlens_jax.measurement import metrics
from conlens_jax.measurement import programs as pure
from conlens_jax.measurement.programs import SwapEffect
from conlens_jax.measurement.training_range import norm_range
from conlens_jax.models.generate import generate as continue_text
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.mesh import batch_sharding
from conlens_jax.parallel.processes import local_rows, on_devices, to_host


@dataclasses.dataclass(frozen=True)
class Explained:
    """Texts and reconstructions of N rows, by decoding: ``greedy`` and ``sampled``.

    Attributes:
      texts: token ids [N, T].
      reconstructions: fp32 [N, D].
      prefix_cos: cosine of a to the reconstruction from the first 1 … T tokens of the text,
        [N, T]; empty where the encoder's prompt continues after the text.
    """

    texts: dict[str, np.ndarray]
    reconstructions: dict[str, np.ndarray]
    prefix_cos: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Measurer:
    """The compiled functions for one model, lens shape and batch size.

    Args:
      spec: shape of the lens.
      horizon: h of ``kl_cont``.
      batch_size: rows per call; the last batch is padded.
      seed: of the sampled texts.
      between: called before every batch; an exception from it ends the measurement.
    """

    def __init__(
        self,
        spec: LensSpec,
        mesh: Mesh,
        *,
        horizon: int,
        batch_size: int,
        seed: int,
        between: Callable[[], None] = lambda: None,
    ):
        self._between = between
        self.spec, self.horizon, self.batch_size = spec, horizon, batch_size
        self.sharding = batch_sharding(mesh)
        self._explain = jax.jit(functools.partial(pure.explain, spec=spec, seed=seed))
        self._read = jax.jit(functools.partial(pure.read_text, spec=spec))
        self._context = jax.jit(
            functools.partial(pure.context_of_batch, spec=spec, horizon=horizon)
        )
        self._effect = jax.jit(functools.partial(pure.effect_of_swap, spec=spec))
        self._odds = jax.jit(functools.partial(pure.odds_of_pair, spec=spec))
        self._text_nll = jax.jit(functools.partial(pure.text_nll, spec=spec))
        self._text_log_probs = jax.jit(functools.partial(pure.text_log_probs, spec=spec))
        self._unembedded = jax.jit(functools.partial(pure.unembedded, spec=spec))
        last = spec.model.n_layers - 1
        self._last_states = jax.jit(functools.partial(pure.states_at, layer=last, spec=spec))
        self._own_states = jax.jit(functools.partial(pure.states_at, layer=spec.layer, spec=spec))

    def explain(self, trainable: Params, frozen: Params, rows: Rows) -> Explained:
        """Texts and reconstructions of every row."""

        def run(batch: Batch, _: int) -> dict[str, tuple[jax.Array, ...]]:
            # One program for both: noise of scale 0 is greedy decoding.
            return {
                name: self._explain(trainable, frozen, batch, *_scalars(scale, draw=0))
                for name, scale in (("greedy", 0.0), ("sampled", 1.0))
            }

        parts = self._over(rows, run)
        return Explained(
            texts={name: text for name, (text, *_) in parts.items()},
            reconstructions={name: vector for name, (_, vector, *_) in parts.items()},
            prefix_cos={name: cos for name, (*_, cos) in parts.items() if cos.size},
        )

    def sample(
        self, trainable: Params, frozen: Params, rows: Rows, draw: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """One more sampled text [N, T] of every row, and its reconstruction [N, D]; draw 0
        repeats that of :meth:`explain`."""
        run = lambda batch, _: self._explain(trainable, frozen, batch, *_scalars(1.0, draw))[:2]
        return self._over(rows, run)

    def read(
        self,
        trainable: Params,
        frozen: Params,
        texts_NT: np.ndarray,
        lengths_N: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reconstructions [N, D] of given texts, or of the first ``lengths_N`` tokens of each."""
        if lengths_N is None:
            lengths_N = np.full(len(texts_NT), texts_NT.shape[1], np.int32)
        run = lambda text, lengths: self._read(trainable, frozen, text, lengths)
        return self._over_texts((texts_NT, lengths_N), run)

    def text_nll(self, original: Params, texts_NT: np.ndarray) -> np.ndarray:
        """−log p per token under M reading the text alone, mean over each text; [N], nats."""
        return self._over_texts((texts_NT,), lambda text: self._text_nll(original, text))

    def text_log_probs(
        self, trainable: Params, frozen: Params, rows: Rows, texts_NT: np.ndarray
    ) -> np.ndarray:
        """The decoder's log p of each token of given texts of the rows; [N, T], nats."""
        run = lambda batch, start: self._text_log_probs(
            trainable, frozen, batch.activation_BD, self._piece(texts_NT, start)
        )
        return self._over(rows, run)

    def odds(
        self,
        original: Params,
        rows: Rows,
        candidates: Mapping[str, np.ndarray],
        pairs_N2: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """log p(second) − log p(first) of a pair of tokens under M at P..P+h−1, with each candidate
        [N, D] swapped in; [N, h] by candidate, nats."""

        def run(batch: Batch, start: int) -> dict[str, jax.Array]:
            context, _, _ = self._context(original, batch)
            pairs_B2 = self._piece(pairs_N2, start)
            return {
                name: self._odds(original, context, self._piece(vectors_ND, start), pairs_B2)
                for name, vectors_ND in candidates.items()
            }

        return self._over(rows, run)

    def effects(
        self, original: Params, rows: Rows, candidates: Mapping[str, np.ndarray]
    ) -> dict[str, SwapEffect]:
        """The effect of each candidate [N, D], and of no swap under the name ``clean``."""

        def run(batch: Batch, start: int) -> dict[str, SwapEffect]:
            context, next_token_B, clean = self._context(original, batch)
            effects = {"clean": clean}
            for name, vectors_ND in candidates.items():
                vector_BD = self._piece(np.asarray(vectors_ND, np.float32), start)
                effects[name] = self._effect(original, context, next_token_B, vector_BD)
            return effects

        return self._over(rows, run)

    def _piece(self, array_N: np.ndarray, start: int) -> jax.Array:
        """The entries of one batch on the device, padded."""
        piece = filled(array_N[start : start + self.batch_size], self.batch_size)
        here = local_rows(self.sharding, self.batch_size)
        return on_devices(piece[here], self.sharding, self.batch_size)

    def unembedded(
        self, original: Params, rows: Rows, states_ND: np.ndarray
    ) -> tuple[SwapEffect, np.ndarray]:
        """What M's own head predicts from given states [N, D], against M's prediction at P (a
        horizon of 1); and its T likeliest tokens [N, T], most likely first."""

        def run(batch: Batch, start: int) -> tuple[SwapEffect, jax.Array]:
            context, next_token_B, _ = self._context(original, batch)
            state_BD = self._piece(np.asarray(states_ND, np.float32), start)
            return self._unembedded(original, context, next_token_B, state_BD)

        return self._over(rows, run)

    def last_states(self, original: Params, rows: Rows) -> np.ndarray:
        """The residual stream after M's last block at P, [N, D]."""
        return self._over(rows, lambda batch, _: self._last_states(original, batch))

    def with_activations(self, original: Params, rows: Rows) -> Rows:
        """The rows with their activations captured again, at the lens's layer and P."""
        states_ND = self._over(rows, lambda batch, _: self._own_states(original, batch))
        return dataclasses.replace(rows, activations_ND=states_ND)

    def continuations(self, original: Params, rows: Rows, n_new: int) -> np.ndarray:
        """M's greedy continuation of each context up to P, [N, n_new]."""

        count, scale, no_stops = jax.device_put(
            (np.int32(n_new), np.float32(1.0), np.zeros(0, np.int32))
        )

        def run(batch: Batch, _: int) -> jax.Array:
            seen_BS = jnp.arange(batch.tokens_GS.shape[1])[None] <= batch.positions_B[:, None]
            return continue_text(
                *(original, batch.tokens_GS, seen_BS, count, None),
                *(scale, None, no_stops),
                slots=n_new,
                config=self.spec.model,
            )

        return self._over(rows, run)

    def _over(self, rows: Rows, run: Callable[[Batch, int], Any]) -> Any:
        """Runs over batches and concatenates the results, a pytree of arrays [batch, …]."""
        outputs = []
        for start in range(0, len(rows), self.batch_size):
            self._between()
            piece = rows.take(slice(start, start + self.batch_size))
            batch = make_batch(piece, self.sharding, self.batch_size, start)
            outputs.append(_run_on_devices(run, batch, start))
        return jax.tree.map(lambda *pieces: np.concatenate(pieces)[: len(rows)], *outputs)

    def _over_texts(self, arrays: Sequence[np.ndarray], run: Callable) -> np.ndarray:
        count, outputs = len(arrays[0]), []
        for start in range(0, count, self.batch_size):
            self._between()
            pieces = (self._piece(array, start) for array in arrays)
            outputs.append(_run_on_devices(run, *pieces))
        return np.concatenate(outputs)[:count]


def _run_on_devices(run: Callable, *arguments: Any) -> Any:
    """The outputs on the host; an implicit copy to the devices, of every batch, raises."""
    with jax.transfer_guard_host_to_device("disallow"):
        outputs = run(*arguments)
    return to_host(outputs)


def _scalars(noise_scale: float, draw: int) -> tuple[jax.Array, jax.Array]:
    return jax.device_put((np.float32(noise_scale), np.int32(draw)))


def other_rows(documents_N: np.ndarray) -> np.ndarray:
    """For each row the index of a row of another document: half the set away.

    Raises:
      ValueError: one document has more than half of the rows, so that there is no such pairing.
    """
    order = np.argsort(documents_N, kind="stable")
    partner = np.empty(len(order), np.int64)
    partner[order] = np.roll(order, len(order) // 2)
    if np.any(documents_N[partner] == documents_N):
        raise ValueError(
            "the validation rows come from too few documents for a control with another row's "
            "text; raise dump.n_validation_samples or lower dump.positions_per_sequence"
        )
    return partner


@dataclasses.dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of the training activations that the metrics are relative to.

    Attributes:
      mean_D: mean activation.
      scale: root mean square of (a − mean) over all coordinates.
      resultant: R, norm of the mean of the unit vectors.
      n_rows: number of rows they are computed on.
      norms: see :class:`~conlens_jax.measurement.training_range.TrainingRange`.
    """

    mean_D: np.ndarray
    scale: float
    resultant: float
    n_rows: int
    norms: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, exact."""
        return {**dataclasses.asdict(self), "mean_D": self.mean_D.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ActivationStatistics:
        return cls(**{**values, "mean_D": np.asarray(values["mean_D"], np.float32)})


def activation_statistics(activations_ND: np.ndarray) -> ActivationStatistics:
    wide = activations_ND.astype(np.float64)
    mean_D = wide.mean(axis=0)
    return ActivationStatistics(
        mean_D=mean_D.astype(np.float32),
        scale=float(np.sqrt(np.mean(np.square(wide - mean_D)))),
        resultant=metrics.resultant_length(wide),
        n_rows=len(wide),
        norms=norm_range(wide),
    )
