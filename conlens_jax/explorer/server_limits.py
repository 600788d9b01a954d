"""What a server takes from its clients: which hosts and origins, how much, and for how long.

ASGI middleware that knows nothing of lenses. Starlette's own TrustedHostMiddleware has no IPv6 in
its older versions and answers in plain text; it has nothing for bodies. Refusals are JSON, with the
same message as ``error`` (the explorer's name for it) and ``detail`` (the NLA API's):

    403  a page of another origin asks
    408  the body does not arrive in time
    413  the body is longer than what is read
    421  another site's name points here (DNS rebinding)
    503  so many bodies are here already that another one would take too much memory

A client that hangs up is noticed while its request is worked on, see
:class:`conlens_jax.explorer.turns.Caller`. What happens below HTTP (headers that do not end,
readers that do not read) is in :mod:`conlens_jax.explorer.slow_clients`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import socket
from collections.abc import Generator, Mapping, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from conlens_jax.explorer.turns import Busy, Caller, calling

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = "<address>"
"""Among the hosts: every IP address. No other site can have one made to point here."""
RETRY = {"Retry-After": "1"}

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""On every answer that does not set its own."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much, and for how long.

    Attributes:
      body_bytes: of one request.
      larger: path → bytes, where a body may be longer.
      all_bodies_bytes: of all requests that are worked on.
      header_seconds, body_seconds: within which a request's head, then its body, must be there.
      write_seconds: so long a client may take nothing of what is ready for it.
      idle_seconds: between two requests of a connection.
      connections: open at once.
    """

    body_bytes: int = 1_200_000
    larger: Mapping[str, int] = dataclasses.field(default_factory=dict)
    all_bodies_bytes: int = 64 * 2**20
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    idle_seconds: float = 5.0
    connections: int = 256


def served_hosts(host: str, more: Sequence[str] = ()) -> tuple[str, ...]:
    """The names by which a server that listens on ``host`` may be asked.

    The loopback names, ``host``, and ``more``. One that listens everywhere may be asked by any
    address, and by the machine's name.
    """
    address = _address(host)
    if address is not None and address.is_unspecified:
        return (*LOOPBACK_NAMES, ANY_ADDRESS, socket.gethostname(), *more)
    return (*LOOPBACK_NAMES, host, *more)


class Refused(Exception):
    """An answer before the application is asked."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class LimitedRequests:
    """The middleware.

    Args:
      hosts: as of :func:`served_hosts`; ``"*"`` among them is any.
      origins: pages of other origins that may ask (``https://name:port``). A page of the server's
        own may, and what is no browser (no Origin header).
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, hosts: Sequence[str], origins: Sequence[str] = ()
    ):
        self.app, self.limits = app, limits
        self.hosts = frozenset(host.lower() for host in hosts)
        self.origins = frozenset(origin.lower().rstrip("/") for origin in origins)
        self._bodies = 0  # bytes that are here now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan; websockets are not offered
            await self.app(scope, receive, send)
            return
        send = _with_headers(send)
        here = 0
        try:
            self._check_sender(Headers(scope=scope))
            most = self._most_bytes(scope)
            body = bytearray()
            try:
                async with asyncio.timeout(self.limits.body_seconds):
                    while True:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            return
                        chunk = message.get("body", b"")
                        here, self._bodies = here + len(chunk), self._bodies + len(chunk)
                        if here > most:
                            raise _too_long(most)
                        if self._bodies > self.limits.all_bodies_bytes:
                            raise Refused(503, "too much is being read; try again", RETRY)
                        body += chunk
                        if not message.get("more_body", False):
                            break
            except TimeoutError:
                seconds = f"{self.limits.body_seconds:g}"
                raise Refused(
                    408, f"the body was not here within {seconds} s", {"Connection": "close"}
                ) from None
            whole = bytes(body)
            del body
            await self._answer(scope, whole, receive, send)
        except Refused as error:
            message = {"error": str(error), "detail": str(error)}
            answer = JSONResponse(message, status_code=error.status, headers=error.headers)
            await answer(scope, receive, send)
        finally:
            self._bodies -= here

    def _check_sender(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_served(host):
            raise Refused(
                421, f"this server is not asked as {host!r}; its --allow_hosts may name others"
            )
        if origin is None or "*" in self.origins or origin.lower() in self.origins:
            return
        with contextlib.suppress(ValueError):
            if host and urlsplit(origin).netloc.lower() == host.lower():
                return
        raise Refused(
            403, f"pages of {origin!r} may not ask here; the server's --allow_origins may name them"
        )

    def _is_served(self, host: str) -> bool:
        if "*" in self.hosts:
            return True
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return name in self.hosts or (ANY_ADDRESS in self.hosts and _address(name) is not None)

    def _most_bytes(self, scope: Scope) -> int:
        """What the body may have. One that says that it has more is refused before it is read."""
        most = self.limits.larger.get(scope["path"], self.limits.body_bytes)
        size = Headers(scope=scope).get("content-length", "")
        if size.isdecimal() and (len(size) > 15 or int(size) > most):
            raise _too_long(most)
        return most

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """The application's answer to a body that is here, watching whether its client stays."""
        left, begun = asyncio.Event(), False

        async def watch(caller: Caller) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            caller.gone.set()
            left.set()

        async def replay() -> Message:
            nonlocal begun
            if not begun:
                begun = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        with calling() as caller:
            watcher = asyncio.create_task(watch(caller))
            try:
                await self.app(scope, replay, send)
            except Exception as error:
                if not caller.gone.is_set():
                    raise
                _log.debug("the client hung up: %s", error)
            finally:
                watcher.cancel()


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return wrapped


class ClosedStream(StreamingResponse):
    """Closes its generator when the answer ends or its reader hangs up.

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
    """What to tell a client of an error, in an answer that has begun.

    What is the server's own fault is logged.
    """
    if isinstance(error, ValueError | Busy):
        return str(error)
    _log.error("a request failed", exc_info=error)
    return f"the server failed ({type(error).__name__}); its log has the trace"


def _too_long(most: int) -> Refused:
    return Refused(413, f"the body is too long; at most {most} bytes are read here")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
