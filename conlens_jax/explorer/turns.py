"""Turns: the requests of a server use its lens one at a time."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import threading
from collections.abc import Iterator

_POLL_SECONDS = 0.2
"""How often a waiting request checks whether its client has hung up."""


class Busy(RuntimeError):
    """Too many requests are waiting."""


class Gone(RuntimeError):
    """The client has hung up, so nobody would read the result."""


class Caller:
    """One request, from its first byte to its last, with the places that it holds.

    Attributes:
      gone: set when the client has hung up.
    """

    def __init__(self) -> None:
        self.gone = threading.Event()
        self._held = contextlib.ExitStack()
        self._places: set[int] = set()

    def hold(self, places: threading.Semaphore) -> bool:
        """Takes a place for the rest of the request, once. Returns False if there is none."""
        if id(places) not in self._places:
            if not places.acquire(blocking=False):
                return False
            self._places.add(id(places))
            self._held.callback(places.release)
        return True

    def check(self) -> None:
        """Raises Gone when the client has hung up."""
        if self.gone.is_set():
            raise Gone("the client has hung up")

    def leave(self) -> None:
        self._held.close()
        self._places.clear()


_CALLER: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("caller", default=None)


@contextlib.contextmanager
def calling() -> Iterator[Caller]:
    """The caller of everything that runs inside, also in worker threads; it leaves at the end."""
    caller = Caller()
    token = _CALLER.set(caller)
    try:
        yield caller
    finally:
        _CALLER.reset(token)
        caller.leave()


class Turns:
    """One request at a time uses the lens, first come, first served; only so many may wait.

    A request that has had a turn keeps its place until it ends (:func:`calling`), so that an answer
    that has begun is not cut off by later requests.

    Attributes:
      most: requests at once, waiting ones included.
    """

    def __init__(self, most: int):
        self.most = most
        self._places = threading.Semaphore(most)
        self._lock, self._line = threading.Lock(), collections.deque[threading.Event]()

    def reserve(self) -> None:
        """Takes the request's place before its answer begins. Raises Busy if there is none."""
        caller = _CALLER.get()
        if caller is not None and not caller.hold(self._places):
            raise _busy()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for the lens and holds it.

        Raises:
          Busy: too many are waiting.
          Gone: the client has hung up.
        """
        caller = _CALLER.get()
        with contextlib.ExitStack() as held:
            if caller is not None:
                self.reserve()
            elif self._places.acquire(blocking=False):
                held.callback(self._places.release)
            else:
                raise _busy()
            held.enter_context(self._at_the_front(caller))
            yield

    @contextlib.contextmanager
    def _at_the_front(self, caller: Caller | None) -> Iterator[None]:
        """Waits in line. With a plain lock, the thread that releases it could take it again before
        the waiting ones."""
        mine = threading.Event()
        with self._lock:
            self._line.append(mine)
            self._line[0].set()
        try:
            while not mine.wait(_POLL_SECONDS):
                if caller is not None:
                    caller.check()
            if caller is not None:
                caller.check()
            yield
        finally:
            with self._lock:
                self._line.remove(mine)
                if self._line:
                    self._line[0].set()


def _busy() -> Busy:
    return Busy("too many requests are waiting; try again in a moment")
