"""Running a lens over rows of a cache: its texts, its reconstructions, and what M does with them.

Two passes. The first explains every row and reads the explanation back; the second puts candidate
vectors into M at P and compares its predictions with the true ones. Everything that a metric needs
comes out as one number a row, so that the bootstrap never touches the model again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from conlens_jax.data.rows import Rows
from conlens_jax.evaluation import metrics
from conlens_jax.lens.batch import Batch, filled, make_batch
from conlens_jax.lens.decoder import generate
from conlens_jax.lens.encoder import encode_prefixes, encode_tokens
from conlens_jax.lens.gumbel import drawn_noise, example_keys
from conlens_jax.lens.losses import cross_entropy, direction_error, kl_divergence
from conlens_jax.lens.original import (
    Context,
    read_context,
    swapped_logits,
    text_alone,
)
from conlens_jax.lens.spec import LensSpec, decoder_of, encoder_of
from conlens_jax.lens.vocabulary import text_terms
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer import embed_tokens
from conlens_jax.parallel.mesh import batch_sharding
from conlens_jax.parallel.processes import local_rows, on_devices, to_host

SAMPLING = 2  # purpose of the evaluation noise, apart from that of training
TOP = 5


@dataclasses.dataclass(frozen=True)
class Explained:
    """What the lens made of N rows; ``greedy`` and ``sampled`` decoding.

    Attributes:
      texts: token ids [N, T] by decoding.
      reconstructions: fp32 [N, D] by decoding.
      prefix_cos: cosine of a to the reconstruction from the first 1 … T tokens of the text,
        [N, T] by decoding; empty where the encoder's prompt goes on behind the text.
    """

    texts: dict[str, np.ndarray]
    reconstructions: dict[str, np.ndarray]
    prefix_cos: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Effect(NamedTuple):
    """What M predicts at P with a vector swapped in, one entry a row.

    Attributes:
      kl_at: KL(M ‖ M with the swap) at P, nats.
      kl_cont: its mean over P..P+h−1.
      ce: −log p of the true next token, nats.
      top_tokens, top_probabilities: [N, TOP], most likely first.
    """

    kl_at: np.ndarray
    kl_cont: np.ndarray
    ce: np.ndarray
    top_tokens: np.ndarray
    top_probabilities: np.ndarray


class Measurer:
    """Holds the compiled functions for one model, lens shape and batch size.

    Args:
      spec: shape of the lens.
      horizon: h of ``kl_cont``.
      batch_size: rows a call; the last batch is filled up.
      seed: of the sampled texts.
    """

    def __init__(self, spec: LensSpec, mesh: Mesh, *, horizon: int, batch_size: int, seed: int):
        self.spec, self.horizon, self.batch_size = spec, horizon, batch_size
        self.sharding = batch_sharding(mesh)
        self._explain = jax.jit(functools.partial(_explain, spec=spec, seed=seed))
        self._read = jax.jit(functools.partial(_read, spec=spec))
        self._context = jax.jit(functools.partial(_context, spec=spec, horizon=horizon))
        self._effect = jax.jit(functools.partial(_effect, spec=spec))
        self._text_nll = jax.jit(functools.partial(_text_nll, spec=spec))

    def explain(self, trainable: Params, frozen: Params, rows: Rows) -> Explained:
        """Texts and reconstructions of every row."""

        def run(batch: Batch, _: int) -> dict[str, tuple[jax.Array, ...]]:
            # One program for both: noise of scale 0 is greedy decoding.
            return {
                name: self._explain(trainable, frozen, batch, jnp.float32(scale))
                for name, scale in (("greedy", 0.0), ("sampled", 1.0))
            }

        parts = self._over(rows, run)
        return Explained(
            texts={name: text for name, (text, *_) in parts.items()},
            reconstructions={name: vector for name, (_, vector, *_) in parts.items()},
            prefix_cos={name: cos for name, (*_, cos) in parts.items() if cos.size},
        )

    def read(self, trainable: Params, frozen: Params, texts_NT: np.ndarray) -> np.ndarray:
        """Reconstructions [N, D] of given texts."""
        return self._over_texts(texts_NT, lambda text: self._read(trainable, frozen, text))

    def text_nll(self, original: Params, texts_NT: np.ndarray) -> np.ndarray:
        """−log p a token under M reading the text alone, mean over each text; [N], nats."""
        return self._over_texts(texts_NT, lambda text: self._text_nll(original, text))

    def effects(
        self, original: Params, rows: Rows, candidates: Mapping[str, np.ndarray]
    ) -> dict[str, Effect]:
        """The effect of each candidate [N, D], and of no swap under the name ``clean``."""

        def run(batch: Batch, start: int) -> dict[str, Effect]:
            context, next_token_B, clean = self._context(original, batch)
            effects = {"clean": clean}
            for name, vectors_ND in candidates.items():
                piece = np.asarray(vectors_ND[start : start + self.batch_size], np.float32)
                vector_BD = self._put(piece)
                effects[name] = self._effect(original, context, next_token_B, vector_BD)
            return effects

        return self._over(rows, run)

    def _over(self, rows: Rows, run: Callable[[Batch, int], Any]) -> Any:
        """Runs over batches and joins what comes back, a pytree of arrays [batch, …]."""
        outputs = []
        for start in range(0, len(rows), self.batch_size):
            piece = rows.take(slice(start, start + self.batch_size))
            batch = make_batch(piece, self.sharding, self.batch_size, start)
            outputs.append(to_host(run(batch, start)))
        return jax.tree.map(lambda *pieces: np.concatenate(pieces)[: len(rows)], *outputs)

    def _over_texts(self, texts_NT: np.ndarray, run: Callable) -> np.ndarray:
        outputs = []
        for start in range(0, len(texts_NT), self.batch_size):
            piece = texts_NT[start : start + self.batch_size]
            outputs.append(to_host(run(self._put(piece))))
        return np.concatenate(outputs)[: len(texts_NT)]

    def _put(self, piece: np.ndarray) -> jax.Array:
        """Up to ``batch_size`` rows on the devices, filled up."""
        here = local_rows(self.sharding, self.batch_size)
        return on_devices(filled(piece, self.batch_size)[here], self.sharding, self.batch_size)


def _explain(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    noise_scale: jax.Array,
    *,
    spec: LensSpec,
    seed: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Texts [B, T], reconstructions [B, D], and their cosines by prefix [B, T] (or [B, 0])."""
    decoder, encoder = decoder_of(trainable, frozen), encoder_of(trainable, frozen, spec)
    keys_B = example_keys(seed, jnp.int32(0), batch.examples_B, SAMPLING)
    noise = drawn_noise(keys_B, spec.text_len, noise_scale)
    text_BT = generate(decoder, batch.activation_BD, noise, spec=spec)
    if spec.encoder_right:
        no_prefixes = jnp.zeros((text_BT.shape[0], 0), jnp.float32)
        return text_BT, encode_tokens(encoder, text_BT, spec=spec), no_prefixes
    prefixes_BTD = encode_prefixes(
        encoder, embed_tokens(encoder.base, text_BT, spec.model), spec=spec
    )
    cos_BT = 1 - direction_error(prefixes_BTD, batch.activation_BD[:, None]) / 2
    return text_BT, prefixes_BTD[:, -1], cos_BT


def _read(trainable: Params, frozen: Params, text_BT: jax.Array, *, spec: LensSpec):
    return encode_tokens(encoder_of(trainable, frozen, spec), text_BT, spec=spec)


def _text_nll(original: Params, text_BT: jax.Array, *, spec: LensSpec):
    start = () if spec.bos is None else (spec.bos,)
    alone = text_alone(original, text_BT, start, spec)
    return jnp.mean(text_terms(alone.head, alone.state_BTD, text_BT)["nll"], axis=-1)


def _context(
    original: Params, batch: Batch, *, spec: LensSpec, horizon: int
) -> tuple[Context, jax.Array, Effect]:
    """The context of a batch, the true next tokens, and M's predictions without a swap."""
    context = read_context(
        original, batch.tokens_GS, batch.mask_GS, batch.positions_B, horizon=horizon, spec=spec
    )
    rows_B = jnp.arange(batch.tokens_GS.shape[0])
    next_token_B = batch.tokens_GS[rows_B, batch.positions_B + 1]
    return context, next_token_B, _describe(context, next_token_B, context.logits_BhV)


def _effect(
    original: Params,
    context: Context,
    next_token_B: jax.Array,
    vector_BD: jax.Array,
    *,
    spec: LensSpec,
) -> Effect:
    logits_BhV = swapped_logits(original, context, vector_BD, spec=spec)
    return _describe(context, next_token_B, logits_BhV)


def _describe(context: Context, next_token_B: jax.Array, logits_BhV: jax.Array) -> Effect:
    kl_Bh = kl_divergence(context.logits_BhV, logits_BhV)
    top_probabilities, top_tokens = jax.lax.top_k(jax.nn.softmax(logits_BhV[:, 0]), TOP)
    return Effect(
        kl_at=kl_Bh[:, 0],
        kl_cont=jnp.mean(kl_Bh, axis=1),
        ce=cross_entropy(logits_BhV[:, 0], next_token_B),
        top_tokens=top_tokens,
        top_probabilities=top_probabilities,
    )


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
class Reference:
    """Statistics of the training activations that the metrics refer to.

    Attributes:
      mean_D: mean activation.
      scale: root mean square of (a − mean) over all coordinates.
      resultant: R, norm of the mean of the unit vectors.
      n_rows: how many rows they are computed on.
    """

    mean_D: np.ndarray
    scale: float
    resultant: float
    n_rows: int


def reference_of(activations_ND: np.ndarray) -> Reference:
    wide = activations_ND.astype(np.float64)
    mean_D = wide.mean(axis=0)
    return Reference(
        mean_D=mean_D.astype(np.float32),
        scale=float(np.sqrt(np.mean(np.square(wide - mean_D)))),
        resultant=metrics.resultant_length(wide),
        n_rows=len(wide),
    )
