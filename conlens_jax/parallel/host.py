"""Settings of the host process."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory instead of handing it back to the system.

    XLA allocates the temporary buffers of a CPU program anew at every call. By default they are
    mapped and unmapped each time, and the page faults cost about a quarter of a training step of
    the embedded model (``scripts/benchmark_malloc.py`` measures it). Called by the entry points,
    before the first large allocation.

    Returns:
      Whether the C library took the settings (False outside Linux with glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TOP_PAD, _GIB), (_M_TRIM_THRESHOLD, -1))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
