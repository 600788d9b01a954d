"""A server that answers while its lenses load: with the page, and the example of its last start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from conlens_jax.explorer.examples import last_example
from conlens_jax.explorer.page_files import serve_files
from conlens_jax.explorer.server_limits import LimitedRequests, Limits
from conlens_jax.explorer.shown import shown_row
from conlens_jax.explorer.warming import places_of

_PAGE = ("/static/", "/api/lens")
_POLL_SECONDS = 0.1


class Opening:
    """The application: before :meth:`ready` only the page, afterwards the real one. Other requests
    wait for it.

    Args:
      name: of the first lens, as :meth:`Lens.load` takes it.
      text: the text that the page opens on; empty: the example.
      limits, hosts, origins: as of the real application.
    """

    def __init__(
        self, name: str, text: str, limits: Limits, hosts: Sequence[str], origins: Sequence[str]
    ):
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_middleware(LimitedRequests, limits=limits, hosts=hosts, origins=origins)
        serve_files(app)
        kept = _kept(name, text)

        @app.get("/api/lens")
        async def describe() -> dict[str, Any]:
            return {"loading": True, "kept": kept}

        self._app: Any = app
        self._is_ready = False

    def ready(self, app: FastAPI) -> None:
        self._app, self._is_ready = app, True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = scope["type"] != "http" or scope["path"] == "/" or scope["path"].startswith(_PAGE)
        while not page and not self._is_ready:
            await asyncio.sleep(_POLL_SECONDS)
        await self._app(scope, receive, send)


def _kept(name: str, text: str) -> dict[str, Any] | None:
    """The example that lies beside the lens. Whether it is of this very lens is not known yet."""
    found = last_example(places_of(name)[:-1])
    if found is None or (text and text != found[0]):
        return None
    text, explained = found
    calibrated = any(row.best.support is not None for row in explained.rows)
    rows = [shown_row(row, calibrated) for row in explained.rows]
    tokens = list(explained.documents[0])
    return {"text": text, "tokens": tokens, "rows": rows}


class Loading:
    """Work in a thread while a server runs; a context of the server's run.

    Args:
      work: gets a stack for what has to be closed when the server has stopped.
      failed: called if it raises; :meth:`check` raises its error again.
    """

    def __init__(self, work: Callable[[contextlib.ExitStack], None], failed: Callable[[], None]):
        self._work, self._failed = work, failed
        self._stack, self._error = contextlib.ExitStack(), None
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)

    def _run(self) -> None:
        try:
            self._work(self._stack)
        except BaseException as error:  # raised again by check
            self._error = error
            self._failed()

    def __enter__(self) -> Loading:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is KeyboardInterrupt and self._thread.is_alive():
            os._exit(130)  # loading cannot be interrupted, and has nothing to save
        self._thread.join()
        self._stack.close()

    def check(self) -> None:
        if self._error is not None:
            raise self._error
