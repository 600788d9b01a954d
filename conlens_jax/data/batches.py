"""The rows of each training step, and prefetching.

The order is a pure function of (seed, step): a resumed run reads the rows that an uninterrupted
run would have read, on any number of processes.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from conlens_jax.config.seeds import numpy_seed
from conlens_jax.data.rows import RowSource

Item = TypeVar("Item")

# Separates this stream of random numbers from others with the same seed.
_PURPOSE = 0x0DE2


def steps_per_epoch(n_rows: int, batch_size: int) -> int:
    """Whole batches in one pass over the rows.

    Raises:
      ValueError: there are fewer rows than one batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if batch_size > n_rows:
        raise ValueError(
            f"batch_size={batch_size} is larger than the {n_rows} rows of the cache; lower "
            "warm.batch_size or joint.batch_size, or raise dump.n_samples"
        )
    return n_rows // batch_size


@functools.lru_cache(maxsize=2)
def _epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting raw Philox output instead of Generator.permutation: NumPy guarantees that the raw
    # stream is the same in all versions, but not the permutation.
    sequence = np.random.SeedSequence([numpy_seed(seed), epoch, _PURPOSE])
    raw = np.random.Philox(sequence).random_raw(n_rows)
    order = np.argsort(raw, kind="stable")
    order.flags.writeable = False  # shared through lru_cache
    return order


def batch_indices(n_rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of step ``step`` (0-based), int64 of shape ``[batch_size]``.

    Every epoch is a new permutation of all rows, keyed by (seed, epoch); an incomplete last batch
    is dropped.

    Raises:
      ValueError: ``batch_size`` is above ``n_rows``, or the seed or step is negative.
    """
    per_epoch = steps_per_epoch(n_rows, batch_size)
    if step < 0 or seed < 0:
        raise ValueError(f"step and seed must not be negative, not {step} and {seed}")
    epoch, number = divmod(step, per_epoch)
    order = _epoch_order(n_rows, seed, epoch)
    return order[number * batch_size : (number + 1) * batch_size].astype(np.int64)


def document_groups(documents_N: np.ndarray, size: int) -> np.ndarray:
    """Groups of ``size`` consecutive rows of the same document; int64 of shape ``[n, size]``.

    The last rows of a document that do not fill a group are dropped.
    """
    new = np.flatnonzero(np.diff(documents_N, prepend=documents_N[:1] - 1))
    counts = np.diff(new, append=len(documents_N))
    starts = [
        np.arange(first, first + count - size + 1, size)
        for first, count in zip(new, counts, strict=True)
    ]
    firsts = np.concatenate([np.zeros(0, np.int64), *starts]).astype(np.int64)
    return firsts[:, None] + np.arange(size)


def read_groups(cache: RowSource, size: int) -> np.ndarray:
    """:func:`document_groups` of a whole cache; single rows where ``size`` is 1.

    Raises:
      ValueError: no document has that many rows.
    """
    if size == 1:
        return np.arange(len(cache))[:, None]
    documents_N = np.concatenate([piece.documents_N for piece in cache.places()])
    groups_nk = document_groups(documents_N, size)
    if not len(groups_nk):
        raise ValueError(
            f"joint.rows_per_document={size}: no document of the cache has that many rows; lower "
            "it or dump again with a larger dump.positions_per_sequence"
        )
    return groups_nk


def grouped_batch(groups_nk: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of a step, as whole groups; see :func:`batch_indices`."""
    n_groups, size = groups_nk.shape
    return groups_nk[batch_indices(n_groups, batch_size // size, seed, step)].reshape(-1)


def pad_tokens(
    token_lists: Sequence[Sequence[int]], seq_len: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Contexts of unequal length as one array: truncated or right-padded to ``seq_len``.

    Returns:
      ``tokens_NS`` int32 and ``lengths_N`` int32 (tokens that are not padding).
    """
    tokens_NS = np.full((len(token_lists), seq_len), pad_id, dtype=np.int32)
    lengths_N = np.zeros(len(token_lists), dtype=np.int32)
    for row, tokens in enumerate(token_lists):
        kept = tokens[:seq_len]
        tokens_NS[row, : len(kept)] = kept
        lengths_N[row] = len(kept)
    return tokens_NS, lengths_N


def prefetch(
    read: Callable[[int], Item], steps: Iterable[int], depth: int = 2
) -> Iterator[tuple[int, Item]]:
    """Yields ``(step, read(step))`` in order, reading up to ``depth`` steps ahead in one thread.

    An exception in ``read`` is raised at its step, after the steps before it were yielded. Closing
    the generator (or an exception in it) waits for the running read and ends the thread.

    Raises:
      ValueError: ``depth`` below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")
    return _prefetch(read, steps, depth)


def _prefetch(
    read: Callable[[int], Item], steps: Iterable[int], depth: int
) -> Iterator[tuple[int, Item]]:
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    ahead: deque[tuple[int, Future[Item]]] = deque()
    try:
        for step in steps:
            ahead.append((step, executor.submit(read, step)))
            if len(ahead) > depth:
                done, future = ahead.popleft()
                yield done, future.result()
        while ahead:
            done, future = ahead.popleft()
            yield done, future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
