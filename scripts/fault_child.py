"""Runs one command of conlens_jax and injects a fault at a given event; used by fault_trials.py.

    python scripts/fault_child.py '{"kind": "kill", "event": 12}' conlens_jax.train --config=…

*Events* are file operations below the folder of the trial (open for writing, rename, remove, create
a folder), reported by Python's audit hooks right before the operation. So a fault can be placed
inside a save, and the same event number gives the same place again.
"""

from __future__ import annotations

import fnmatch
import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
FILLER = "filler"
_PAGE = 4096


class Striker:
    """Counts events and injects the fault once.

    The fault is a dictionary: ``kind``; ``root``, the folder whose events count; ``event`` (the
    number of the event, from 1) or ``match`` (a pattern of the paths that count) with ``nth``;
    ``page_left``: only if the last page of the file has fewer free bytes, so that an appended line
    needs a new page; ``delay``, seconds from the event to the fault; ``path``, the damaged file or
    folder. Without ``event`` and ``match`` it only counts.
    """

    def __init__(self, fault: dict[str, Any]):
        self.fault, self.count, self._struck = fault, 0, False
        self._root = os.path.realpath(fault["root"])
        self._lock = threading.RLock()

    def hook(self, name: str, arguments: tuple) -> None:
        path = self._path(name, arguments)
        if path is None or self._struck:
            return
        with self._lock:
            pattern = self.fault.get("match")
            if self._struck or (pattern and not fnmatch.fnmatch(path, pattern)):
                return
            if (page_left := self.fault.get("page_left")) and not _page_ends(path, page_left):
                return
            self.count += 1
            wanted = self.fault.get("nth", 1) if pattern else self.fault.get("event")
            if self.count != wanted:
                return
            self._struck = True
        if delay := self.fault.get("delay", 0):
            threading.Timer(delay, self._strike).start()
        else:
            self._strike()

    def _path(self, name: str, arguments: tuple) -> str | None:
        """The path of an event; None if it does not count."""
        if name == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set(mode) & set("wax+")
            if not writes or not isinstance(path, str | bytes | os.PathLike):
                return None
        elif name in _CHANGES:
            path = arguments[0]
        else:
            return None
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        path = os.path.abspath(os.fsdecode(path))
        return path if path.startswith(self._root + os.sep) else None

    def _strike(self) -> None:
        kind, path = self.fault["kind"], self.fault.get("path", "")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind == "fill":
            fill(Path(path))
        elif kind == "small files":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        elif kind == "cut":
            os.truncate(path, os.path.getsize(path) // 2)
        elif kind == "alter":
            alter(Path(path))


def _page_ends(path: str, page_left: int) -> bool:
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    return size > 0 and _PAGE - size % _PAGE < page_left


def fill(folder: Path) -> None:
    """Fills the file system of a folder."""
    with open(folder / FILLER, "ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def alter(file: Path) -> None:
    """Flips a byte in the last quarter of a file, in place."""
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size * 7 // 8)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x40]))


def main() -> None:
    fault = json.loads(sys.argv[1])
    sys.argv = sys.argv[2:]
    other = [arg for arg in sys.argv if arg.startswith("--config.distributed.process_id=")]
    if other and not other[0].endswith(f"={fault.get('process', 0)}"):
        fault = {"kind": "none", "root": fault["root"]}
    striker = Striker(fault)
    if after := fault.get("after"):
        timer = threading.Timer(after, striker._strike)
        timer.daemon = True
        timer.start()
    sys.addaudithook(striker.hook)
    started = time.time()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        if "count_file" in fault:
            counted = {"events": striker.count, "seconds": time.time() - started}
            Path(fault["count_file"]).write_text(json.dumps(counted))


if __name__ == "__main__":
    main()
