"""Who may use the lens of a server now."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import threading
from collections.abc import Iterator

_A_LOOK = 0.2
"""Seconds after which one who waits looks whether its client is still there."""


class Busy(RuntimeError):
    """Too many requests are waiting."""


class Gone(RuntimeError):
    """The client has hung up: nobody reads what would be computed."""


class Caller:
    """One request, from its first byte to its last: what it holds, and whether its client listens.

    Attributes:
      gone: set when the client has hung up.
    """

    def __init__(self) -> None:
        self.gone = threading.Event()
        self._held = contextlib.ExitStack()
        self._places: set[int] = set()

    def hold(self, places: threading.Semaphore) -> bool:
        """Takes a place for the rest of the request, once. False where there is none."""
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
    """The caller of all that runs inside, in worker threads too; it leaves at the end."""
    caller = Caller()
    token = _CALLER.set(caller)
    try:
        yield caller
    finally:
        _CALLER.reset(token)
        caller.leave()


class Turns:
    """One request at a time at the lens, in the order of asking, and not too many waiting for it.

    A request that has had a turn keeps its place until it ends (:func:`calling`), so that no answer
    that has begun breaks off because others came.

    Attributes:
      most: so many may be there at once.
    """

    def __init__(self, most: int):
        self.most = most
        self._places = threading.Semaphore(most)
        self._lock, self._line = threading.Lock(), collections.deque[threading.Event]()

    def reserve(self) -> None:
        """Takes the request's place before its answer begins. Raises Busy where there is none."""
        caller = _CALLER.get()
        if caller is not None and not caller.hold(self._places):
            raise _busy()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for the lens.

        Raises:
          Busy: too many wait already.
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
        """A plain lock would let whoever releases it take it again before those who wait."""
        mine = threading.Event()
        with self._lock:
            self._line.append(mine)
            self._line[0].set()
        try:
            while not mine.wait(_A_LOOK):
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
