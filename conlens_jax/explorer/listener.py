"""The server's socket, opened before the lens is loaded."""

from __future__ import annotations

import errno
import socket

from conlens_jax.config import ConfigError


def listener_on(host: str, port: int) -> socket.socket:
    """A listening socket: the port is reserved while a model loads, and early clients wait.

    Args:
      port: 0 takes any free one; ``getsockname()[1]`` of the socket returns it.

    Raises:
      ConfigError: the port is in use or not allowed, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = f"--port={port} is in use on {host}; give another --port (0: any free one)"
        elif error.errno == errno.EACCES:
            problem = f"--port={port} is not allowed to this user; give one above 1023"
        else:
            problem = f"--host={host!r} cannot be served: {error.strerror or error}"
        raise ConfigError(problem) from error
