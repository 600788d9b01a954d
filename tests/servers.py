"""A server on a free port of this machine, as the explorer starts it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def serving(app: Any, limits: Any = None) -> Iterator[str]:
    """The address of a running server."""
    import uvicorn  # of the extra 'explore'

    from conlens_jax.explorer.server_limits import Limits
    from conlens_jax.explorer.slow_clients import uvicorn_options

    options = uvicorn_options(limits or Limits())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)  # who asks before the server is up waits
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
