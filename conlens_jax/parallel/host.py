"""Settings of the host process."""

from __future__ import annotations

import ctypes
import sys

import jax
from jax.experimental.compilation_cache import compilation_cache

from conlens_jax.config.paths import local_path

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


def use_compilation_cache(folder: str, least_seconds: float = 1.0) -> None:
    """Keeps compiled programs in ``folder`` for later runs; an empty name changes nothing.

    Programs that compile in less than ``least_seconds`` are not kept. Programs that
    were compiled before are not in it.
    """
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(local_path(folder)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
        # JAX settles at its first compilation whether there is a cache; let it look again.
        compilation_cache.reset_cache()
