"""SIGTERM, as Slurm and spot machines send it before they take a machine away."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

PREEMPTED = os.EX_TEMPFAIL
"""Exit code (75) of a run that saved and can go on: job scripts turn it into a requeue."""


class Preempted(Exception):
    """The run was asked to stop and has saved; the message says where it goes on."""


@contextlib.contextmanager
def watching_for_sigterm() -> Iterator[Callable[[int], bool]]:
    """Gives a function of the step that every process calls behind every step: whether to stop.

    A signal to one process stops all of them behind the same step, the one after the furthest
    (JAX's preemption service agrees on it, and has the signal's handler where there are several
    processes). Orbax asks the service too, with the steps of its checkpoints: training's must be
    the same, and must rise.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread is told of signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
