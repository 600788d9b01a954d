"""The files of checkpoints on disk, and error messages for damaged ones."""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from conlens_jax.files.paths import checkpoint_path_problem, local_path
from conlens_jax.models.param_table import leaf_name, named_leaves
from conlens_jax.training.checksums import checksums

STATE, METADATA, METRICS, CHECKSUMS = "state", "metadata", "metrics", "checksums"
_CHECKED_BYTES = 256 * 2**20
_MEANING = {"NOT_FOUND": "is missing", "OUT_OF_RANGE": "is cut short", "DATA_LOSS": "is damaged"}


class CheckpointError(ValueError):
    """A checkpoint that does not exist or does not match; the message gives the fix."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that exists and cannot be read.

    Attributes:
      step: the damaged one.
      whole: the newest one before it that can be read, or None.
    """

    def __init__(self, path: Path, problem: str, whole: int | None):
        self.step, self.whole = int(path.name), whole
        if whole is None:
            advice = "No checkpoint before it is whole: begin again in another run_dir."
        else:
            advice = (
                f"The newest whole one before it is step {whole}. To read that one give "
                f"--step={whole} (from Python: step={whole}, or the folder "
                f"{str(path.parent / str(whole))!r}). To train on from it, move the damaged one "
                "away and give the same command again:\n"
                f"    mv {shlex.quote(str(path))} {shlex.quote(str(_unused(path)))}"
            )
        super().__init__(f"the checkpoint {path} is damaged: {problem}\n{advice}")


def _unused(path: Path) -> Path:
    """An unused name for a damaged checkpoint, next to the folder of checkpoints."""
    name = path.parent.parent / f"damaged-{path.name}"
    while name.exists():
        name = name.with_name(name.name + "-again")
    return name


class _LiteralPath(type(epath.Path("/"))):
    """A path for Orbax in which ``*``, ``?`` and ``[`` are literal.

    When Orbax merges the files of several processes, it searches with a glob pattern that includes
    the folder's name: below ``a[1]`` it finds nothing, below ``a*`` perhaps another run's files.
    """

    def glob(self, pattern: str) -> Iterator[_LiteralPath]:
        for name in glob.glob(pattern, root_dir=os.fspath(self)):
            yield self / name


def storage_path(folder: str | Path) -> epath.Path:
    """``folder`` as a path for Orbax.

    Raises:
      CheckpointError: Orbax cannot store checkpoints under this name.
    """
    if problem := checkpoint_path_problem(folder):
        raise CheckpointError(problem)
    return _LiteralPath(local_path(folder))


# --- reading back -------------------------------------------------------------------------------


def stored_json(path: Path, item: str) -> dict[str, Any]:
    """A JSON item of a checkpoint. Read by the handler: a Checkpointer would wait for the other
    processes, and here a single process may read."""
    with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
        return handler.restore(storage_path(path) / item)


def stored_tree(path: Path) -> PyTree:
    """The tree of a checkpoint: dicts whose leaves are the metadata (shape, dtype) of arrays."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.metadata(storage_path(path) / STATE).tree


def stored_arrays(path: Path, tree: PyTree, names: set[str]) -> dict[str, np.ndarray]:
    """Some arrays of a checkpoint, unsharded, in host memory."""

    def item(where: Any, leaf: Any) -> Any:
        return np.zeros(()) if leaf_name(where) in names else ocp.PLACEHOLDER

    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        restored = handler.restore(
            storage_path(path) / STATE,
            args=ocp.args.PyTreeRestore(
                item=jax.tree_util.tree_map_with_path(item, tree),
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree),
            ),
        )
    return {name: leaf for name, leaf in named_leaves(restored).items() if name in names}


class ReadBack:
    """A record of a state that is saved, to compare with the checkpoint read back.

    It has the names, shapes and dtypes of all arrays, and the values of the smallest ones, up to
    256 MB on this host: a problem with reading affects all arrays.
    """

    def __init__(self, state: PyTree):
        leaves = named_leaves(state)
        self._kinds = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in leaves.items()}
        self._values, room = {}, _CHECKED_BYTES
        for name in sorted(leaves, key=lambda name: leaves[name].nbytes):
            room -= leaves[name].nbytes
            if room < 0 and self._values:
                break
            shards = getattr(leaves[name], "addressable_shards", None)
            pieces = [(s.index, s.data) for s in shards] if shards else [((), leaves[name])]
            # A copy: the caller may donate the arrays.
            self._values[name] = [(index, np.array(data)) for index, data in pieces]

    def check(self, path: Path) -> None:
        """Raises CheckpointError if the checkpoint at ``path`` differs."""
        try:
            with quiet_storage():
                tree = stored_tree(path)
                found = stored_arrays(path, tree, set(self._values))
        except Exception as error:
            if not is_damage(error):
                raise
            raise CheckpointError(_unreadable(path, reason_of(error, path))) from error
        kinds = {name: (tuple(v.shape), v.dtype) for name, v in named_leaves(tree).items()}
        problems = [
            name
            for name in sorted(kinds.keys() | self._kinds.keys())
            if kinds.get(name) != self._kinds.get(name)
        ]
        problems += [
            name
            for name, pieces in self._values.items()
            if not all(_same_bits(found[name][index], data) for index, data in pieces)
        ]
        if problems:
            shown = ", ".join(problems[:4]) + (", …" if problems[4:] else "")
            raise CheckpointError(_unreadable(path, f"{shown} came back different"))


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _unreadable(path: Path, problem: str) -> str:
    return (
        f"the checkpoint {path} was written and cannot be read back: {problem}. Choose a run_dir "
        "on another disk or with a simpler name."
    )


def saved_checksums(path: Path) -> dict[str, int]:
    """The :func:`~conlens_jax.training.checksums.checksums` saved with a checkpoint; empty for one
    of an earlier version."""
    if not (path / CHECKSUMS).is_dir():
        return {}
    return stored_json(path, CHECKSUMS)


def check_values(path: Path, tree: PyTree, restored: Mapping[str, Any]) -> None:
    """Raises ValueError if arrays, by name, are not those that were saved. Arrays that were cast
    on reading are not compared.

    Args:
      tree: of the checkpoint, from :func:`stored_tree`.
    """
    saved, kinds = saved_checksums(path), named_leaves(tree)
    alike = {name: leaf for name, leaf in restored.items() if leaf.dtype == kinds[name].dtype}
    found = checksums({name: leaf for name, leaf in alike.items() if name in saved})
    if wrong := [name for name in sorted(found) if found[name] != saved[name]]:
        raise ValueError(
            f"the values of {', '.join(wrong[:3])}{' and others' if wrong[3:] else ''} are not "
            "those that were saved"
        )


# --- damage -------------------------------------------------------------------------------------


def is_damage(error: Exception) -> bool:
    """Whether a read error is due to the files, not the request or the machine."""
    others = (CheckpointError, MemoryError, PermissionError, jax.errors.JaxRuntimeError)
    return not isinstance(error, others)


def reason_of(error: BaseException, path: Path) -> str:
    """The storage's error in one line; files are relative to the step's folder."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in reversed(causes):
        text = str(cause)
        kind = re.match(rf"({'|'.join(_MEANING)}): ", text)
        text = re.split(r" \[(?:tensorstore_spec|source locations)", text)[0]
        files = re.findall(r'local file "([^"]+)"', text)
        if kind and files and not files[-1].endswith("/"):
            return f"{_relative(files[-1], path)} {_MEANING[kind[1]]}"
        if kind and (array := re.search(r'"([^"]+)/\.z\w+"', text)):
            return f"the array {array[1]} {_MEANING[kind[1]]}"
    for cause in causes:
        if isinstance(cause, json.JSONDecodeError | UnicodeDecodeError):
            return f"one of its files is not whole JSON ({cause})"
    text = " ".join(re.split(r" \[(?:tensorstore_spec|source locations)", str(error))[0].split())
    return f"{_relative(text, path)[:300]}" or type(error).__name__


def _relative(text: str, path: Path) -> str:
    return text.replace(f"{path}/", "")


def metrics_problem(path: Path) -> str | None:
    """What is wrong with the metrics file of a step, which Orbax reads for all steps; None if it is
    valid or does not exist."""
    file = path / METRICS / METRICS
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        return f"{METRICS}/{METRICS} is not whole JSON ({error})"
    return None


def stored_metrics(path: Path) -> dict[str, float]:
    """The metrics recorded with a step; empty if there are none, or the file is damaged."""
    file = path / METRICS / METRICS
    if not file.is_file() or metrics_problem(path):
        return {}
    return json.loads(file.read_text(encoding="utf-8"))


@contextlib.contextmanager
def quiet_storage() -> Iterator[None]:
    """Keeps a failing read from printing pages: of many concurrent reads only the first error is
    raised, and the others are printed where they are dropped."""
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

    def on_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not _is_dropped(error):
            excepthook(kind, error, trace)

    def on_unraisable(unraisable: Any) -> None:
        if not _is_dropped(unraisable.exc_value):
            unraisablehook(unraisable)

    logger, silence = logging.getLogger("asyncio"), lambda record: record.exc_info is None
    sys.excepthook, sys.unraisablehook = on_error, on_unraisable
    logger.addFilter(silence)
    try:
        yield
    except Exception:
        time.sleep(0.1)  # for the other reads to end
        gc.collect()
        raise
    finally:
        sys.excepthook, sys.unraisablehook = excepthook, unraisablehook
        logger.removeFilter(silence)


def _is_dropped(error: BaseException | None) -> bool:
    return "Event loop is closed" in str(error) or "tensorstore" in str(error).lower()
