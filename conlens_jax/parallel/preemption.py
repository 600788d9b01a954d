"""SIGTERM, as Slurm and spot machines send it before they take a machine away.

Work that can be saved polls whether to stop (:func:`watching_for_sigterm`), saves, and raises
:class:`Preempted`. Other work (loading, compiling, evaluating) can simply be repeated: one process
stops at once (:func:`leaving_on_sigterm`); several processes must agree, so they stop where they
poll next.
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
"""Exit code (75) of a run that saved and can be resumed: job scripts requeue it."""

# The preemption service stops all processes at the first number that none of them has passed. The
# numbers must increase over the whole process: one that is already passed is never reached again,
# and the signal would go unnoticed.
_numbers = itertools.count(1)


class Preempted(BaseException):
    """The run received SIGTERM and has saved; the message explains how it resumes. As for Ctrl-C,
    ``except Exception`` does not catch it."""


def stop_together() -> bool:
    """Whether several processes have to stop; False in one process, which stops at once.

    Every process calls this at the same points, in the same order. A signal to one of them stops
    all at the same point, the first that none has passed (JAX's preemption service, which installs
    the signal handler if there are several processes).
    """
    if jax.process_count() == 1:
        return False
    return multihost_utils.reached_preemption_sync_point(next(_numbers))


def leave_together(what: str) -> None:
    """Raises :class:`Preempted` if several processes have to stop (:func:`stop_together`);
    ``what`` explains what the same command will do."""
    if stop_together():
        raise Preempted(f"SIGTERM: {what}")


@contextlib.contextmanager
def watching_for_sigterm(saved: str) -> Iterator[Callable[[], bool]]:
    """Yields a function that every process calls after every step: whether to save and stop.

    A signal after the last of these steps is not lost: the end of the block raises
    :class:`Preempted`, with ``saved`` as its message, if nothing else has raised.
    """
    if jax.process_count() > 1:
        yield stop_together
        leave_together(saved)
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread receives signals
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
    """Within the block SIGTERM raises :class:`Preempted`, except inside
    :func:`watching_for_sigterm`. Several processes replace the handler when they connect."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # already stopping
        raise Preempted("SIGTERM: the same command goes on from what was saved last")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
