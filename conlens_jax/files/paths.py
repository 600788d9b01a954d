"""Paths that users give: ``~`` is their home folder, and unusable paths are refused early."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

PATH_FIELDS = (
    "run_dir",
    "model.path",
    "embedded.cache_dir",
    "corpus.path",
    "corpus.prompts",
    "dump.cache_dir",
    "target.path",
    "target.model_path",
    "train.init_from",
    "train.compile_cache",
)
"""Fields of the configuration that are paths; empty means that none was given."""

PATTERN = re.compile(r"[*?\[]|::")
"""Patterns, which some libraries do not accept in a name."""

# Orbax reads /gs/x as gs://x, even where a file system is mounted there.
_BUCKETS = ("az", "gs", "hf", "s3")


def expanded(path: str) -> str:
    """``path`` with the home folder in place of a leading ``~`` or ``~user``."""
    return os.path.expanduser(path)


def local_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a user's ``path``, independent of later changes of the working folder.
    Symbolic links are not followed."""
    return Path(os.path.expanduser(path)).absolute()


def cache_folder() -> Path:
    """Where files that can be made again are kept, outside any checkout: ``$CONLENS_CACHE``, or
    else ``~/.cache/conlens_jax``."""
    return local_path(os.environ.get("CONLENS_CACHE") or "~/.cache/conlens_jax")


def path_problems(name: str, path: str) -> Iterator[str]:
    """Why the value of a path field, ``~`` expanded, cannot be a path."""
    if "\0" in path:
        yield f"{name}={path!r}: a path cannot contain the character NUL"
    if path.startswith("~"):
        yield (
            f"{name}={path!r}: there is no such user; give the absolute path, or ./{path} for a "
            "folder of that name"
        )


def checkpoint_path_problem(path: str | os.PathLike[str]) -> str | None:
    """Why checkpoints cannot be stored below ``path``; None where they can."""
    place = local_path(path)
    advice = "choose another folder, or give a symbolic link with another name"
    if "\\" in str(place):
        return (
            f"{str(place)!r} has a backslash in its name, which the storage of checkpoints reads "
            f"as a slash; {advice}"
        )
    if len(place.parts) > 1 and place.parts[1] in _BUCKETS:
        return (
            f"{str(place)!r} begins with /{place.parts[1]}, which the storage of checkpoints reads "
            f"as {place.parts[1]}://; {advice}"
        )
    return None


def write_problems(name: str, folder: str | Path) -> Iterator[str]:
    """Why nothing can be written to a folder, which need not exist yet.

    Args:
      name: the field or flag that names it.
    """
    if "://" in str(folder):
        return
    place = local_path(folder)
    try:
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            yield f"{name}={str(folder)!r}: {place} is a file, not a folder; choose another"
            return
        # Permissions are not enough: the disk may be read-only, or full.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = error.strerror or error
        yield f"{name}={str(folder)!r} cannot be written ({place}: {reason}); choose another"
