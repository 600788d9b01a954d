"""Several processes that run one program on one mesh: start, synchronise, and stop together.

Every process runs the same steps. Only the first process logs and writes; each reads only the rows
that its own devices compute. A single process is a group of one and needs no special case.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import PyTree

from conlens_jax.config import DistributedConfig

Json = Any
Result = TypeVar("Result")
LOST_PROCESS = 1


class ProcessError(RuntimeError):
    """The processes of a run did not connect, or differ; the message explains."""


def start_processes(config: DistributedConfig) -> None:
    """Connects to the other processes of the run. Call it once, before the first use of JAX.

    Raises:
      ProcessError: they do not connect within five minutes, or ``"auto"`` finds no cluster.
    """
    if not config.coordinator:
        return
    timeouts = {
        "heartbeat_timeout_seconds": config.timeout,
        "shutdown_timeout_seconds": config.timeout,
    }
    try:
        if config.coordinator == "auto":
            jax.distributed.initialize(**timeouts)
        else:
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                cluster_detection_method="deactivate",
                **timeouts,
            )
    except (ValueError, RuntimeError) as error:
        raise ProcessError(
            f"distributed.coordinator={config.coordinator!r}: processes did not connect: {error}"
        ) from error
    # Connections are made at the first barrier, and on a CPU within 30 seconds: so the first one
    # must not be where a process may keep the others waiting.
    barrier("start")


def is_first() -> bool:
    """Whether this is the process that logs and writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """The first process runs the block before all others, which find the files it wrote."""
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


def gathered(value: Json) -> list[Json]:
    """Every process's value (any JSON), in the order of the processes; the same list in all."""
    if jax.process_count() == 1:
        return [value]
    content = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    # One program for many lengths.
    padded = np.zeros(1 << int(max(lengths) - 1).bit_length(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    everyones = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:length].tobytes()) for row, length in zip(everyones, lengths, strict=True)
    ]


def together(work: Callable[[], Result]) -> Result:
    """``work()``, after every process has run its own; a failure in one is a failure in all.

    Raises:
      ValueError, OSError: ``work`` raised it in this process. Other errors are not shared.
      ProcessError: ``work`` failed in another process.
    """
    if jax.process_count() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        failure = error
    failures = gathered(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for number, message in enumerate(failures):
        if message is not None:
            raise ProcessError(f"process {number} failed: {message}")
    return result


def broadcast_from_first(work: Callable[[], Json]) -> Json:
    """The result of ``work()``, which only the first process runs, in every process. Raises as
    :func:`together`."""
    return gathered(together(lambda: work() if is_first() else None))[0]


def check_same(what: str, content: bytes) -> None:
    """Raises ProcessError in every process if ``content`` is not the same in all."""
    if jax.process_count() == 1:
        return
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(content)))
    others = np.flatnonzero(sums != sums[0])
    if len(others):
        raise ProcessError(
            f"process {others[0]} has another {what} than process 0: all need the same code, "
            "config and files; is there a shared file system?"
        )


def local_rows(sharding: Sharding, n_rows: int) -> np.ndarray:
    """Which rows of a global batch are on this process's devices, in increasing order."""
    slices = sharding.addressable_devices_indices_map((n_rows,)).values()
    starts = {index[0].indices(n_rows)[:2] for index in slices}
    return np.concatenate([np.arange(*start_stop) for start_stop in sorted(starts)])


def on_devices(local: np.ndarray, sharding: Sharding, n_rows: int) -> jax.Array:
    """A global array of ``n_rows`` from each process's :func:`local_rows` of it."""
    # An explicit copy, which JAX counts as an implicit one where there are several processes.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_process_local_data(sharding, local, (n_rows, *local.shape[1:]))


def to_host(tree: PyTree) -> PyTree:
    """Global arrays as NumPy arrays, whole in every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


@contextlib.contextmanager
def stopping_with_others() -> Iterator[None]:
    """Exits if a computation on the devices fails because another process is gone.

    This process cannot recover from that, and an orderly exit would wait for the lost process.
    Every process prints the message: the first may be the one that died.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} stops: work that all "
            f"processes share failed ({str(error).splitlines()[0]}). If another process died, its "
            "own log says why. The same command, with any number of processes, goes on from what "
            "was saved last.",
            file=sys.stderr,
        )
        leave(LOST_PROCESS)


def leave(code: int) -> None:
    """Exits with ``code``; does not wait for other processes, so that they notice at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)
