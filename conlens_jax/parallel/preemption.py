"""SIGTERM, as Slurm and spot machines send it before they take a machine away.

What is under way and can be saved asks whether to stop (:func:`watching_for_sigterm`), saves, and
raises :class:`Preempted`. Everything else (loading, compiling, evaluating) leaves nothing behind
that is not done again just as well: in one process it is left at once
(:func:`leaving_on_sigterm`); several processes must agree, so they stop where they ask next.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

PREEMPTED = os.EX_TEMPFAIL
"""Exit code (75) of a run that saved and can go on: job scripts turn it into a requeue."""

# The preemption service stops all processes at the first number that none of them has passed. The
# numbers must rise over the whole process: one that is passed already is never reached again, and
# the signal would go unnoticed.
_numbers = itertools.count(1)


class Preempted(BaseException):
    """The run was asked to stop and has saved; the message says where it goes on. Like Ctrl-C it
    passes those who catch every Exception."""


def stop_together() -> bool:
    """Whether several processes were asked to stop; False in one process, which is left at once.

    Every process asks at the same points, in the same order. A signal to one of them stops all at
    the same point, the one after the furthest (JAX's preemption service agrees on it, and has the
    signal's handler where there are several processes).
    """
    if jax.process_count() == 1:
        return False
    return multihost_utils.reached_preemption_sync_point(next(_numbers))


def leave_together(what: str) -> None:
    """Raises :class:`Preempted` where several processes were asked to stop, see
    :func:`stop_together`; ``what`` tells what the same command does then."""
    if stop_together():
        raise Preempted(f"SIGTERM: {what}")


@contextlib.contextmanager
def watching_for_sigterm(saved: str) -> Iterator[Callable[[], bool]]:
    """Gives a function that every process calls behind every step: whether to save and stop.

    A signal that comes behind the last of these steps is not lost: the end of the block raises
    :class:`Preempted`, with ``saved`` as its message, where nothing else did.
    """
    if jax.process_count() > 1:
        yield stop_together
        leave_together(saved)
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread is told of signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked.is_set():
        raise Preempted(f"SIGTERM: {saved}")


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises :class:`Preempted` wherever nobody watches for it. Several
    processes replace the handler when they meet."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is leaving already
        raise Preempted("SIGTERM: the same command goes on from what was saved last")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
