"""A model that writes after many prompts at once, on the mesh, and how fast it does.

:mod:`conlens_jax.data.model_documents` writes documents with it, and
:mod:`conlens_jax.data.targets.model` descriptions.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from conlens_jax.models.decoding import Drawing, Rest, TextWriter
from conlens_jax.models.matrix_sizes import weights_per_token
from conlens_jax.models.model import LanguageModel
from conlens_jax.models.transformer_config import array_dtype
from conlens_jax.parallel.mesh import batch_sharding, replicated
from conlens_jax.parallel.processes import local_rows, on_devices, to_host

_PROMPT_STEP, _SLOT_STEP = 8, 32
_GROUP = 16  # prompts that are read together: products of 16 prompts are at their full rate
_PRODUCT_WIDTH = {"cpu": 2048}


class PromptWriter:
    """Continues batches of prompts."""

    def __init__(self, model: LanguageModel, mesh: Mesh):
        self._config, self._pad_id = model.config, model.tokenizer.pad_id
        self._writer = TextWriter(model.params, model.config)
        self._sharding = batch_sharding(mesh)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        keys_B: Key[Array, "B"],
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        most_shared: int | None = None,
        longest: int = 0,
    ) -> list[np.ndarray]:
        """The tokens after each of B prompts, at most ``max_tokens``, without the one that ended
        the text.

        Prompts of similar length are read together, at the length of the longest of them in steps
        of 8, each of which is a program.

        Args:
          prompts: of at least one token each; what all begin with is read once.
          keys_B: of each prompt's draws, which depend on nothing else in the batch.
          temperature, top_p: see :class:`~conlens_jax.models.decoding.Drawing`; a temperature of 0
            takes the most probable tokens.
          most_shared, longest: how many tokens may be read once, and the length of prompts that
            there is room for. Each number of either is a set of programs: where batches differ,
            these make them the same.
        """
        shortest, longest = min(map(len, prompts)), max(longest, *map(len, prompts))
        shared = min(len(os.path.commonprefix(prompts)), shortest - 1)
        if most_shared is not None:
            shared = min(shared, most_shared)
        groups = self._groups([len(tokens) - shared for tokens in prompts])
        order = np.concatenate(groups)
        rests = [self._rest([prompts[row][shared:] for row in rows]) for rows in groups]
        written_BT = np.empty((len(prompts), max_tokens), np.int32)
        written_BT[order] = to_host(
            self._writer.write(
                np.asarray(prompts[0][:shared], np.int32),
                rests,
                Drawing(
                    keys_B=keys_B[order],
                    temperature=jnp.float32(temperature) if temperature else None,
                    top_p=jnp.float32(top_p) if top_p < 1 else None,
                ),
                jnp.asarray(self._config.eos_token_ids, jnp.int32),
                length=max_tokens,
                slots=_rounded(shared + _width(longest - shared) + max_tokens, _SLOT_STEP),
            )
        )
        ends_BT = np.isin(written_BT, self._config.eos_token_ids)
        lengths_B = np.where(ends_BT.any(axis=1), ends_BT.argmax(axis=1), max_tokens)
        return [row[:length] for row, length in zip(written_BT, lengths_B, strict=True)]

    def _groups(self, lengths: Sequence[int]) -> list[np.ndarray]:
        """Rows that are read together. On several devices all of them: each has its own rows."""
        if self._sharding.num_devices > 1:
            return [np.arange(len(lengths))]
        order = np.argsort(lengths, kind="stable")
        groups = np.split(order, np.arange(_GROUP, len(lengths), _GROUP))
        widths = {_width(max(lengths[row] for row in rows)) for rows in groups}
        return [order] if len(widths) == 1 else groups

    def _rest(self, rests: Sequence[Sequence[int]]) -> Rest:
        """The tokens of a group and their mask, padded on the left."""
        width = _width(max(map(len, rests)))
        tokens_bS = np.full((len(rests), width), self._pad_id, np.int32)
        for row, tokens in zip(tokens_bS, rests, strict=True):
            row[width - len(tokens) :] = tokens
        mask_bS = np.arange(width)[None] >= width - np.array([[len(tokens)] for tokens in rests])
        here = local_rows(self._sharding, len(rests))
        tokens, mask = (
            on_devices(array[here], self._sharding, len(rests)) for array in (tokens_bS, mask_bS)
        )
        return tokens, mask


def tokens_written(texts: Sequence[np.ndarray], max_tokens: int) -> int:
    """How many tokens the model wrote for texts of :meth:`PromptWriter.write`, with their ends."""
    return sum(min(len(text) + 1, max_tokens) for text in texts)


class WritingSpeed:
    """Tokens per second, beside what the machine's matrix products allow.

    The first batch waits for the compiler, and counts only if it is the only one.
    """

    def __init__(self, model: LanguageModel, mesh: Mesh):
        self._model, self._mesh = model, mesh
        self._rate = matrix_product_rate(mesh, model)
        self._batches: list[tuple[int, float]] = []

    @contextlib.contextmanager
    def measured(self) -> Iterator[Callable[[int], None]]:
        """Times a batch; yields what is called with its number of tokens."""
        started, counts = time.time(), []
        yield counts.append
        self._batches.append((sum(counts), time.time() - started))

    @property
    def tokens_per_s(self) -> float:
        tokens, seconds = np.sum(self._batches[1:] or self._batches, axis=0)
        return float(tokens / seconds)

    def summary(self) -> dict[str, float]:
        """For the log: the speed, and the FLOP/s of the weights that these tokens used as a share
        of those of :func:`matrix_product`."""
        rate = max(self._rate, matrix_product_rate(self._mesh, self._model))
        flops = self.tokens_per_s * 2 * weights_per_token(self._model.config)
        return {
            "tokens_per_s": self.tokens_per_s,
            "gflops_of_tokens": flops / 1e9,
            "gflops_of_matrix_products": rate / 1e9,
            "share": flops / rate,
        }


def matrix_product(mesh: Mesh, model: LanguageModel) -> tuple[Callable[[], Array], int]:
    """A plain product of large matrices in the model's dtype on all devices, and its FLOPs: its
    speed is the limit that writing is compared with."""
    sharding, width = batch_sharding(mesh), _PRODUCT_WIDTH.get(jax.default_backend(), 8192)
    rows = width * sharding.num_devices
    ones = lambda rows: np.ones((rows, width), array_dtype(model.config))
    left = on_devices(ones(rows)[local_rows(sharding, rows)], sharding, rows)
    right = on_devices(ones(width), replicated(mesh), width)
    return functools.partial(jax.jit(jnp.matmul), left, right), 2 * rows * width**2


def matrix_product_rate(mesh: Mesh, model: LanguageModel) -> float:
    """FLOP/s of :func:`matrix_product`."""
    product, flops = matrix_product(mesh, model)
    jax.block_until_ready(product())
    started = time.perf_counter()
    jax.block_until_ready([product() for _ in range(4)])
    return 4 * flops / (time.perf_counter() - started)


def _width(length: int) -> int:
    """The padded length of a group whose longest rest has this many tokens."""
    return 1 if length == 1 else _rounded(length, _PROMPT_STEP)


def _rounded(length: int, step: int) -> int:
    return -(-length // step) * step
