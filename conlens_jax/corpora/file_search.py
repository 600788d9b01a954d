"""Finds the files of ``corpus.path``, and lists the others in the same folder."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from conlens_jax.corpora.corpus import CorpusError

_NAMED = 3


def find_files(path: str, *suffixes: str, field: str = "corpus.path") -> list[Path]:
    """The files of a path, sorted: a file, all files below a folder whose names end in one of
    ``suffixes``, or a glob (``**`` allowed). A path that exists is never treated as a glob.

    Args:
      field: the setting with this path, for messages.

    Raises:
      CorpusError: there is no such file.
    """
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        found = [file for file in files_below(path) if file.name.endswith(suffixes)]
        looked_for = f"{' or '.join(f'*{suffix}' for suffix in suffixes)} file in the folder"
    elif os.path.lexists(path):
        raise CorpusError(
            f"{field}={path!r} is not a file or folder (a pipe, a device or a broken link); "
            "write the texts to a file"
        )
    elif glob.has_magic(path):
        found = _matching(path)
        looked_for = "file matching"
    else:
        raise CorpusError(f"{field}={path!r} does not exist")
    # Pipes and devices are endless, or cannot be read twice.
    files = [file for file in found if file.is_file()]
    if not files:
        raise CorpusError(f"there is no {looked_for} {field}={path!r}")
    return sorted(files)


def left_out_note(path: str, files: Sequence[Path]) -> tuple[str, ...]:
    """A line that lists the files of a folder that are not read; empty if all are."""
    if not Path(path).is_dir():
        return ()
    read = set(files)
    others = sorted(
        str(file.relative_to(path))
        for file in files_below(path)
        if file not in read and not file.name.startswith(".")
    )
    if not others:
        return ()
    more = ", …" if len(others) > _NAMED else ""
    return (f"not read in {path}: {len(others)} other files ({', '.join(others[:_NAMED])}{more})",)


def files_below(folder: str) -> list[Path]:
    """All files below a folder.

    Links to folders are followed, but no folder is read twice, and links to the root of the search
    or above it are skipped.

    Raises:
      CorpusError: a folder cannot be listed.
    """
    root, seen, files = os.path.realpath(folder), set(), []
    tops = [str(folder)]
    for top in tops:  # grows: links are followed after the folder itself
        for here, folders, names in os.walk(top, onerror=_refuse):
            real = os.path.realpath(here)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            files += [Path(here, name) for name in names]
            links = sorted(name for name in folders if os.path.islink(os.path.join(here, name)))
            for name in links:
                target = os.path.realpath(os.path.join(here, name))
                if os.path.commonpath([root, target]) != target:
                    tops.append(os.path.join(here, name))
    return files


def _refuse(error: OSError) -> None:
    raise CorpusError(f"corpus.path: {error.filename} cannot be read ({error.strerror})")


def _matching(pattern: str) -> list[Path]:
    """The files that a glob matches. The ``**`` of :mod:`glob` would follow cyclic links."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return list(map(Path, glob.glob(pattern)))
    first = parts.index("**")
    bases = glob.glob(str(Path(*parts[:first]))) if first else ["."]
    found: dict[str, Path] = {}
    for base in sorted(filter(os.path.isdir, bases)):
        for file in files_below(base):
            if _matches(file.relative_to(base).parts, parts[first:]):
                found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """As in glob: ``**`` is any number of folders; hidden names match only patterns with a dot."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        deeper = bool(names) and not names[0].startswith(".") and _matches(names[1:], patterns)
        return deeper or _matches(names, patterns[1:])
    return (
        bool(names)
        and fnmatch.fnmatchcase(names[0], patterns[0])
        and names[0].startswith(".") <= patterns[0].startswith(".")
        and _matches(names[1:], patterns[1:])
    )
