"""Which files ``corpus.path`` means, and which ones beside them are left out."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from conlens_jax.data.corpus import CorpusError

_NAMED = 3


def find_files(path: str, *suffixes: str) -> list[Path]:
    """The files that ``corpus.path`` means: a file, all files below a folder whose names end in one
    of ``suffixes``, or a glob (``**`` allowed), sorted. A path that exists is never a glob.

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
            f"corpus.path={path!r} is not a file or folder (a pipe, a device or a broken link); "
            "write the texts to a file"
        )
    elif glob.has_magic(path):
        found = _without_repeats(map(Path, glob.glob(path, recursive=True)))
        looked_for = "file matching"
    else:
        raise CorpusError(f"corpus.path={path!r} does not exist")
    # Pipes and devices have no end, or none that can be read twice.
    files = [file for file in found if file.is_file()]
    if not files:
        raise CorpusError(f"there is no {looked_for} corpus.path={path!r}")
    return sorted(files)


def left_out_note(path: str, files: Sequence[Path]) -> tuple[str, ...]:
    """A line about the files of a folder that are not read; nothing where there are none."""
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
    """Everything below a folder that is not a folder.

    Links to folders are followed, but none is read twice, and none that leads back to where the
    search began or above it.

    Raises:
      CorpusError: a folder that cannot be listed.
    """
    root, seen, files = os.path.realpath(folder), set(), []
    tops = [str(folder)]
    for top in tops:  # grows: links come after all that lies in the folder itself
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


def _without_repeats(files: Iterable[Path]) -> list[Path]:
    """Each file once: a glob follows links to folders, in circles too."""
    first: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: (len(file.parts), file)):
        first.setdefault(os.path.realpath(file), file)
    return list(first.values())
