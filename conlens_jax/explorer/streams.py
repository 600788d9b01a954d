"""Streamed answers: closed with their client, as JSON or as server-sent events."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Generator, Iterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from conlens_jax.explorer.turns import Busy, Gone

_log = logging.getLogger(__name__)


class ClosedStream(StreamingResponse):
    """Closes its generator when the answer ends or its client hangs up.

    Starlette leaves that to the garbage collector.
    """

    def __init__(self, content: Generator[str | bytes, None, None], media_type: str):
        super().__init__(content, media_type=media_type)
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._content.close()


def failure(error: Exception) -> str:
    """The error message for an answer that has begun. The server's own errors are logged."""
    if isinstance(error, ValueError | Busy):
        return str(error)
    _log.error("a request failed", exc_info=error)
    return f"the server failed ({type(error).__name__}); its log has the trace"


def json_stream(head: dict[str, Any], name: str, entries: Iterator[Any]) -> ClosedStream:
    """One JSON object: ``head``, and a list under ``name``, with one entry in memory at a time.
    The activations of a long text are gigabytes as Python numbers."""

    def pieces() -> Iterator[str]:
        yield f"{json.dumps(head)[:-1]}, {json.dumps(name)}: ["
        for number, entry in enumerate(entries):
            yield (", " if number else "") + json.dumps(entry, ensure_ascii=False)
        yield "]}"

    return ClosedStream(pieces(), media_type="application/json")


def event_stream(frames: Iterator[dict[str, Any]]) -> ClosedStream:
    """Server-sent events, one per frame."""

    def lines() -> Iterator[str]:
        with contextlib.closing(frames):
            try:
                for frame in frames:
                    yield f"data: {json.dumps(frame, ensure_ascii=False)}\n\n"
                yield "data: [DONE]\n\n"
            except Gone:
                raise
            except Exception as error:  # the answer has begun
                yield f"data: {json.dumps({'error': failure(error)})}\n\n"

    return ClosedStream(lines(), media_type="text/event-stream")
