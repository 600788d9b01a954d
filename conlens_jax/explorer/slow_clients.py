"""Clients that are slow below HTTP: heads that do not end, and clients that do not read.

uvicorn limits only the time of idle connections. This is its HTTP protocol with three more limits
on time: for a request's head, for a body that continues after its answer, and for a client that
does not read what is sent (at most 64 KiB wait in the process). It also limits the number of
connections.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from conlens_jax.explorer.server_limits import Limits

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Type: text/plain\r\nContent-Length: 21\r\n\r\ntoo many connections\n"
)


def uvicorn_options(limits: Limits) -> dict[str, Any]:
    """Arguments for ``uvicorn.run`` or ``uvicorn.Config``."""
    return {
        "http": type("LimitedProtocol", (TimedProtocol,), {"limits": limits}),
        "ws": "none",
        "timeout_keep_alive": max(round(limits.idle_seconds), 1),
        "timeout_graceful_shutdown": 5,
    }


class TimedProtocol(H11Protocol):
    limits = Limits()
    _request_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.write(_FULL)
            transport.close()
        else:
            self._watch_request()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self.flow.write_paused:  # a client that sends more has read the last answer
            self._reader_timer = _cancelled(self._reader_timer)
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()
        self._watch_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader_timer = _cancelled(self._reader_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_timer = _cancelled(self._request_timer)
        self._reader_timer = _cancelled(self._reader_timer)
        super().connection_lost(exc)

    def _watch_request(self) -> None:
        """Starts the timer for a head, or for the rest of a body that is already answered."""
        if self.conn.their_state is h11.IDLE:
            seconds = self.limits.header_seconds
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            seconds = self.limits.body_seconds
        else:
            self._request_timer = _cancelled(self._request_timer)
            return
        if self._request_timer is None:
            self._request_timer = self.loop.call_later(seconds, self.transport.abort)

    def _watch_reader(self) -> None:
        if self._reader_timer is None and self.transport.get_write_buffer_size():
            self._reader_timer = self.loop.call_later(self.limits.write_seconds, self._reader_late)

    def _reader_late(self) -> None:
        self._reader_timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
