"""Who may use the lens of a server now."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Busy(RuntimeError):
    """Too many requests are waiting."""


class Turns:
    """One request at a time at the lens, and not too many waiting for it.

    Attributes:
      most: so many may be there at once.
    """

    def __init__(self, most: int):
        self.most = most
        self._lock, self._places = threading.Lock(), threading.Semaphore(most)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for the lens. Raises Busy where too many do already."""
        if not self._places.acquire(blocking=False):
            raise Busy("too many requests are waiting; try again in a moment")
        try:
            with self._lock:
                yield
        finally:
            self._places.release()
