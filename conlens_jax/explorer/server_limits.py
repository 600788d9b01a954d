"""Limits on a server's clients: hosts and origins, sizes and times.

ASGI middleware, independent of lenses. Starlette's own TrustedHostMiddleware does not support IPv6
in its older versions, answers in plain text, and does not limit bodies. Refusals are JSON with the
same message as ``error`` (the explorer's key) and ``detail`` (the NLA API's):

    403  the request comes from a page of another origin
    408  the body does not arrive in time
    413  the body is too long
    421  the host name is another site's that points here (DNS rebinding)
    503  the bodies in memory leave no room for this one

A client that hangs up is detected while its request is processed, see
:class:`conlens_jax.explorer.turns.Caller`. Slowness below HTTP (headers that do not end, clients
that do not read) is handled in :mod:`conlens_jax.explorer.slow_clients`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import socket
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from conlens_jax.explorer.turns import Caller, calling

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = "<address>"
"""Among the hosts: every IP address. An address, unlike a name, cannot be made to point here."""
RETRY = {"Retry-After": "1"}

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Headers of every answer that does not set its own."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes and times.

    Attributes:
      body_bytes: longest body of a request.
      larger: path → bytes, for paths with longer bodies.
      all_bodies_bytes: longest total of all requests in progress.
      header_seconds, body_seconds: time for a request's head, then for its body, to arrive.
      write_seconds: time that a client may leave sent data unread.
      idle_seconds: time between two requests of a connection.
      connections: most open connections.
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
    """The host names that requests to a server listening on ``host`` may use.

    The loopback names, ``host``, and ``more``; for a server that listens on every interface, any
    address and the machine's name.
    """
    address = _address(host)
    if address is not None and address.is_unspecified:
        return (*LOOPBACK_NAMES, ANY_ADDRESS, socket.gethostname(), *more)
    return (*LOOPBACK_NAMES, host, *more)


class Refused(Exception):
    """A request that is answered without calling the application."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class LimitedRequests:
    """The middleware.

    Args:
      hosts: as of :func:`served_hosts`; ``"*"`` among them is any.
      origins: other origins whose pages may send requests (``https://name:port``). The server's own
        pages may, and clients without an Origin header, which are no browsers.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, hosts: Sequence[str], origins: Sequence[str] = ()
    ):
        self.app, self.limits = app, limits
        self.hosts = frozenset(host.lower() for host in hosts)
        self.origins = frozenset(origin.lower().rstrip("/") for origin in origins)
        self._bodies = 0  # bytes in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan; websockets are not supported
            await self.app(scope, receive, send)
            return
        send = _with_headers(send)
        received = 0  # bytes of this body
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
                        received, self._bodies = received + len(chunk), self._bodies + len(chunk)
                        if received > most:
                            raise _too_long(most)
                        if self._bodies > self.limits.all_bodies_bytes:
                            raise Refused(503, "too much is being read; try again", RETRY)
                        body += chunk
                        if not message.get("more_body", False):
                            break
            except TimeoutError:
                seconds = f"{self.limits.body_seconds:g}"
                raise Refused(
                    408, f"the body did not arrive within {seconds} s", {"Connection": "close"}
                ) from None
            whole = bytes(body)
            del body
            await self._answer(scope, whole, receive, send)
        except Refused as error:
            message = {"error": str(error), "detail": str(error)}
            answer = JSONResponse(message, status_code=error.status, headers=error.headers)
            await answer(scope, receive, send)
        finally:
            self._bodies -= received

    def _check_sender(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_served(host):
            raise Refused(
                421, f"this server does not answer as {host!r}; add names with --allow_hosts"
            )
        if origin is None or "*" in self.origins or origin.lower() in self.origins:
            return
        with contextlib.suppress(ValueError):
            if host and urlsplit(origin).netloc.lower() == host.lower():
                return
        raise Refused(
            403, f"pages of {origin!r} may not send requests; add origins with --allow_origins"
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
        """The limit on the body. A longer Content-Length is refused before the body is read."""
        most = self.limits.larger.get(scope["path"], self.limits.body_bytes)
        size = Headers(scope=scope).get("content-length", "")
        if size.isdecimal() and (len(size) > 15 or int(size) > most):
            raise _too_long(most)
        return most

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """The application's answer to a complete body; watches whether the client hangs up."""
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


def _too_long(most: int) -> Refused:
    return Refused(413, f"the body is too long; at most {most} bytes are read here")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
