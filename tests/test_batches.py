"""The order of rows, their division over processes, padding, and reading ahead."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from conlens_jax.data.batches import (
    batch_indices,
    pad_tokens,
    prefetch,
    steps_per_epoch,
)

# Of (seed 0, step 0) and (seed 1, step 3), ten rows in batches of five.
RECORDED = [[1, 0, 4, 2, 9], [8, 4, 9, 5, 2]]


def epoch_of(n_rows: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    steps = steps_per_epoch(n_rows, batch_size)
    return np.concatenate(
        [batch_indices(n_rows, batch_size, seed, epoch * steps + step) for step in range(steps)]
    )


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_covers_every_row_once(epoch):
    order = epoch_of(24, 6, seed=5, epoch=epoch)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(24))
    assert list(order) != list(range(24))


def test_incomplete_batch_is_dropped():
    assert steps_per_epoch(26, 6) == 4
    order = epoch_of(26, 6, seed=0, epoch=0)
    assert len(order) == len(set(order)) == 24
    # The rows that are left out change from epoch to epoch.
    left_out = [set(range(26)) - set(epoch_of(26, 6, 0, epoch)) for epoch in range(4)]
    assert len({frozenset(rows) for rows in left_out}) > 1


def test_order_depends_on_seed_and_epoch():
    orders = {tuple(epoch_of(64, 8, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_order_is_a_pure_function_also_of_the_process():
    steps = [7, 2, 40, 7]
    here = [batch_indices(37, 5, 11, step).tolist() for step in steps]
    assert here[0] == here[3]
    batch_indices(37, 5, 11, 7)[:] = -1  # a caller who writes into its batch harms nobody
    assert batch_indices(37, 5, 11, 7).tolist() == here[0]
    code = (
        "from conlens_jax.data.batches import batch_indices\n"
        f"print([batch_indices(37, 5, 11, step).tolist() for step in {steps}])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


def test_order_is_the_recorded_one():
    """A checkpoint from another day or NumPy version must go on in the same order."""
    assert batch_indices(10, 5, seed=0, step=0).tolist() == RECORDED[0]
    assert batch_indices(10, 5, seed=1, step=3).tolist() == RECORDED[1]


def test_bad_batches():
    with pytest.raises(ValueError, match="batch_size=9 is larger than the 8 rows"):
        batch_indices(8, 9, 0, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        batch_indices(8, 0, 0, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        batch_indices(8, 2, 0, -1)


def test_pad_tokens():
    tokens_NS, lengths_N = pad_tokens([[1, 2], [], [3, 4, 5, 6], [7, 8, 9]], 3, pad_id=99)
    assert tokens_NS.tolist() == [[1, 2, 99], [99, 99, 99], [3, 4, 5], [7, 8, 9]]
    assert lengths_N.tolist() == [2, 0, 3, 3]
    assert tokens_NS.dtype == lengths_N.dtype == np.int32


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_prefetch_keeps_the_order(depth):
    assert list(prefetch(lambda step: step * step, range(5, 25), depth)) == [
        (step, step * step) for step in range(5, 25)
    ]
    assert not prefetch_threads()


def test_prefetch_reads_ahead_but_not_further_than_depth():
    started: list[int] = []
    third = threading.Event()

    def read(step):
        started.append(step)
        if step == 2:
            third.set()
        return step

    stream = prefetch(read, iter(range(1000)), depth=2)
    assert started == []
    assert next(stream) == (0, 0)
    # Nobody asks for step 2 and yet it is read: that is what the thread is for.
    assert third.wait(timeout=10)
    assert started == [0, 1, 2]
    stream.close()
    assert started == [0, 1, 2]
    assert not prefetch_threads()


def test_prefetch_uses_one_background_thread():
    seen = {name for _, name in prefetch(lambda _: threading.current_thread().name, range(9))}
    assert len(seen) == 1
    assert threading.current_thread().name not in seen


def test_prefetch_raises_at_the_failing_step():
    def read(step):
        if step == 3:
            raise OSError("bad sector")
        return step

    done = []
    with pytest.raises(OSError, match="bad sector"):
        for step, _ in prefetch(read, range(9)):
            done.append(step)
    assert done == [0, 1, 2]
    assert not prefetch_threads()


def test_prefetch_stops_when_the_caller_fails():
    stream = prefetch(lambda step: step, range(9))
    with pytest.raises(KeyError):
        stream.throw(KeyError("caller"))
    stream = prefetch(lambda step: step, range(9))
    next(stream)
    with pytest.raises(KeyError):
        stream.throw(KeyError("caller"))
    assert not prefetch_threads()


def test_closing_drops_the_reads_that_wait():
    started: list[int] = []
    running, release = threading.Event(), threading.Event()

    def read(step):
        started.append(step)
        if step == 1:
            running.set()
            release.wait(timeout=10)
        return step

    stream = prefetch(read, range(9), depth=5)
    assert next(stream) == (0, 0)
    assert running.wait(timeout=10)
    timer = threading.Timer(0.1, release.set)
    timer.start()
    stream.close()
    timer.join()
    assert started == [0, 1]


def test_prefetch_rejects_a_bad_depth_at_once():
    with pytest.raises(ValueError, match="depth"):
        prefetch(lambda step: step, range(3), depth=0)
