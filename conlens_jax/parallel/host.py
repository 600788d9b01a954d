"""Settings of the host process."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import platform
import sys
import zlib
from collections import deque
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from conlens_jax.files.paths import cache_folder, local_path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_GIB = 1 << 30
_ZSTD = b"\x28\xb5\x2f\xfd"


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory instead of returning it to the system.

    XLA allocates the temporary buffers of a CPU program at every call. By default they are
    mapped and unmapped each time, and the page faults cost about a quarter of a training step of
    the embedded model (``scripts/benchmark_malloc.py`` measures it). Called by the entry points,
    before the first large allocation.

    Returns:
      Whether the C library accepted the settings (False except on Linux with glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TOP_PAD, _GIB), (_M_TRIM_THRESHOLD, -1))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


class RunAhead:
    """Keeps the host at most ``most`` steps ahead of the devices: called with the outputs of each
    step that was started, it waits for those of the step ``most`` steps before.

    XLA's CPU client can deadlock with 32 unfinished programs and as many threads as devices
    (``scripts/studies/virtual_devices.py``); a few suffice to keep any device busy.
    """

    def __init__(self, most: int = 8):
        self._most, self._outputs = most, deque[Any]()

    def __call__(self, outputs: Any) -> None:
        self._outputs.append(outputs)
        if len(self._outputs) > self._most:
            jax.block_until_ready(self._outputs.popleft())


def drop_cut_programs(folder: Path) -> list[str]:
    """Removes truncated programs (after a kill or a full disk) from a compilation cache; returns
    their names.

    JAX writes such a file in place and never rewrites it: it would warn and compile at every start.
    Only files newer than the last check are read.
    """
    looked = folder / "looked_through"
    since = looked.stat().st_mtime_ns if looked.exists() else 0
    cut = []
    for file in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process checks too, or the disk is full
            if file.stat().st_mtime_ns >= since and not _is_whole(file.read_bytes()):
                file.unlink()
                cut.append(file.name)
    if folder.is_dir():
        with contextlib.suppress(OSError):
            looked.touch()
    return cut


def _is_whole(program: bytes) -> bool:
    """Whether a compressed file is complete; True if there is no library to check it."""
    if not program.startswith(_ZSTD):
        try:
            zlib.decompress(program)
        except zlib.error:
            return False
        return True
    try:
        import zstandard
    except ImportError:
        return True
    try:
        zstandard.ZstdDecompressor().decompress(program)
    except zstandard.ZstdError:
        return False
    return True


def keep_programs() -> None:
    """Keeps compiled programs in the cache folder, unless JAX has a folder for them already."""
    if not jax.config.jax_compilation_cache_dir:
        use_compilation_cache(str(cache_folder() / "programs" / _machine()), least_seconds=0.2)


def _machine() -> str:
    """A name that machines of different instructions do not share: XLA compiles for the processor
    at hand."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                digest = hashlib.sha256(line.encode()).hexdigest()[:12]
                return f"{platform.machine()}-{digest}"
    return f"{platform.machine()}-{platform.node()}"


def use_compilation_cache(folder: str, least_seconds: float = 1.0) -> None:
    """Keeps compiled programs in ``folder`` for later runs; an empty name changes nothing.

    Programs that compile in less than ``least_seconds``, and those compiled before this call, are
    not kept.
    """
    if folder:
        path = local_path(folder)
        drop_cut_programs(path)
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
        # JAX decides at its first compilation whether there is a cache; make it decide again.
        compilation_cache.reset_cache()
