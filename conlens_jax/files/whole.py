"""Atomic writes, and errors that name a full disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

# A full file system, a quota, and a limit on the size of files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason_of(error: Exception) -> str:
    """The operating system's reason why something could not be written: storage libraries report a
    full disk in the middle of a long message."""
    text = str(error)
    for number in _FULL:
        if os.strerror(number) in text:
            return os.strerror(number)
    return text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a temporary file, syncs and renames it; returns its size and sha256."""
    temporary = path.with_name(path.name + ".tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` durable."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: str | Path, text: str) -> None:
    """Replaces a text file atomically: after a kill or a full disk the old one is still there.
    If ``path`` is a link, its target is replaced; a pipe or a device is written to.

    Raises:
      OSError: it cannot be written; a full disk is named with the file.
    """
    path = Path(os.path.realpath(path))
    with naming_full_disk(path):
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            write_atomically(path, [text.encode()])


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Adds the file, its folder and the free space there to an error of a full disk, which the
    operating system reports without a name."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB"
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}: {path.name} could not be written in {path.parent} "
            f"({free} free there); make room and run the same command again",
        ) from error
