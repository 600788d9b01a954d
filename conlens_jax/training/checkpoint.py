"""Checkpoints of a run: whole or absent, the newest and the best kept, restored on any mesh.

A folder holds one sub-folder a step: ``<step>/state`` (arrays, Orbax), ``<step>/metadata`` and
``<step>/checksums`` (JSON). Orbax writes under a temporary name and renames at the end, so a step's
folder is complete as soon as it has its name. Writing goes through :class:`Checkpoints`, which one
run owns; reading needs only the folder (:func:`restore_params`, :func:`read_metadata`,
:func:`all_steps`) and never disturbs a run that is writing. What is read is compared with the
checksums.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from conlens_jax.files.paths import local_path
from conlens_jax.training.checkpoint_storage import (
    CHECKSUMS,
    METADATA,
    STATE,
    CheckpointError,
    DamagedCheckpoint,
    ReadBack,
    check_values,
    is_damage,
    metrics_problem,
    named_leaves,
    quiet_storage,
    reason_of,
    storage_path,
    stored_arrays,
    stored_json,
    stored_tree,
)
from conlens_jax.training.checksums import checksums

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DamagedCheckpoint",
    "all_steps",
    "any_metadata",
    "read_metadata",
    "restore_params",
    "restore_state",
    "step_of",
]

_STEP = re.compile(r"[0-9]+")

PyTree = Any

CHECKPOINT_METRIC = "kl_at_sampled"
"""The validation score that makes a checkpoint the best one; lower is better."""
_T = TypeVar("_T")


class Checkpoints:
    """The checkpoints of one run, for the process (or processes) that write them.

    Saves go on in the background while training continues; leaving the ``with`` block, or
    :meth:`close`, waits for the last one. Kept are the newest ``keep_latest``, the ``keep_best``
    with the lowest ``metric`` and, where they were saved, the steps of ``keep_steps``. The first
    checkpoint of a folder is read back before training goes on, see
    :class:`~conlens_jax.training.checkpoint_storage.ReadBack`.

    Args:
      folder: made if needed. What a killed run left half-written in it is removed.
      keep_latest: at least 1.
      keep_best: how many by metric; checkpoints saved without a finite one do not compete.
      metric: key of ``metrics`` in :meth:`save`; lower is better.
      keep_steps: steps that stay for good, such as the last one of the warm start.

    Raises:
      CheckpointError: a folder whose name the storage cannot take, or a damaged checkpoint in it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_latest: int,
        keep_best: int,
        metric: str = "validation_loss",
        keep_steps: Iterable[int] = (),
    ):
        if keep_latest < 1:
            raise ValueError(f"checkpoint.keep_latest must be at least 1, not {keep_latest}")
        logger = absl_logging.get_absl_logger()
        logger.addFilter(_is_news)  # once: a filter that is there already is not added
        self.folder = local_path(folder)
        place = storage_path(self.folder)
        self._reads_back = not all_steps(self.folder)
        for step in all_steps(self.folder):
            if problem := metrics_problem(self.folder / str(step)):
                raise _damaged(self.folder / str(step), problem)
        policy = _Preserve(keep_latest, keep_best, metric, frozenset(keep_steps))
        self._manager = _Manager(
            place,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                # Orbax writes and reads metrics only where this is given; the policy decides.
                best_fn=policy.value,
                best_mode="min",
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Starts writing a checkpoint and returns whether one is written.

        The arrays are copied before the call returns, so the caller may donate them.

        Args:
          step: optimizer steps done; names the checkpoint.
          state: a pytree of arrays (no strings, no typed PRNG keys).
          metadata: anything JSON can hold.
          metrics: scalars; ``metric`` among them makes the checkpoint compete for the best.
          force: write the step anew where it exists; otherwise it stays and False is returned.

        Raises:
          CheckpointError: the first checkpoint of the folder cannot be read back as it was given.
        """
        self._manager.wait_until_finished()
        if step in self._manager.all_steps():
            if not force:
                return False
            self._manager.delete(step)
        given = ReadBack(state) if self._reads_back else None
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    STATE: ocp.args.PyTreeSave(state),
                    METADATA: ocp.args.JsonSave(dict(metadata)),
                    CHECKSUMS: ocp.args.JsonSave(checksums(named_leaves(state))),
                }
            ),
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            force=True,
        )
        if given is not None and saved:
            self._manager.wait_until_finished()
            given.check(self.folder / str(step))
            self._reads_back = False
        return saved

    def all_steps(self) -> list[int]:
        """The complete checkpoints, in rising order."""
        self.wait()
        return all_steps(self.folder)

    def restore(self, step: int | None, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The state and the metadata of a step (None: the newest).

        See :func:`restore_state`.
        """
        self.wait()
        return restore_state(self.folder, step, template)

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and ends the background work. Without it that save is lost."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Where an error is on its way, a save that fails too has nothing to add: mostly the same
        # full disk.
        with contextlib.suppress(*(() if error is None else (OSError, ValueError))):
            self.close()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to print a log record. What goes wrong in Orbax's threads it logs with a page of
    trace for each; the next save or wait raises the same error, which is told in words."""
    return not (record.exc_info and "orbax" in record.pathname)


class _Manager(ocp.CheckpointManager):
    """Orbax's, but for one question: training alone asks whether to stop, see
    :mod:`conlens_jax.parallel.preemption`."""

    def reached_preemption(self, step: int) -> bool:
        return False


class _Preserve:
    """Which checkpoints stay: newest, best and named ones (an Orbax preservation policy)."""

    def __init__(self, newest: int, best: int, metric: str, steps: frozenset[int]):
        self._newest, self._best, self._metric, self._steps = newest, best, metric, steps

    def value(self, metrics: Mapping[str, float] | None) -> float:
        """The metric to be small; infinite where it is absent or not finite."""
        value = (metrics or {}).get(self._metric, math.inf)
        return value if math.isfinite(value) else math.inf

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        values = {info.step: self.value(info.metrics) for info in checkpoints}
        measured = [step for step in values if math.isfinite(values[step])]
        keep = set(sorted(values)[-self._newest :]) | self._steps
        keep.update(sorted(measured, key=lambda step: (values[step], -step))[: self._best])
        return [info.step in keep for info in checkpoints]


# --- reading ------------------------------------------------------------------------------------


def all_steps(folder: str | Path) -> list[int]:
    """The complete checkpoints of a folder in rising order; empty where there is no folder."""
    folder = local_path(folder)
    if not folder.is_dir():
        return []
    return sorted(
        int(child.name)
        for child in folder.iterdir()
        if _STEP.fullmatch(child.name) and (child / STATE).is_dir()
    )


def read_metadata(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """The metadata of a step (None: the newest).

    Raises:
      CheckpointError: there is no such checkpoint.
      DamagedCheckpoint: it cannot be read; which one before it can is said.
    """
    return _read(folder, step, _metadata)


def any_metadata(folder: str | Path) -> dict[str, Any]:
    """The metadata of the newest step whose metadata can be read; empty where there is none. For
    what is the same in all of them."""
    for step in reversed(all_steps(folder)):
        try:
            return _metadata(local_path(folder) / str(step))
        except Exception as error:
            if not is_damage(error):
                raise
    return {}


def restore_state(
    folder: str | Path, step: int | None, template: PyTree
) -> tuple[PyTree, dict[str, Any]]:
    """The whole state and the metadata of a step (None: the newest).

    Args:
      template: the state's structure, with arrays or ``jax.ShapeDtypeStruct`` leaves. A leaf's
        sharding is where the restored array goes, whatever mesh it was saved from.

    Raises:
      CheckpointError: there is no such checkpoint, or the template's names, shapes or dtypes
        differ from it (all of them are listed).
      DamagedCheckpoint: it cannot be read; which one before it can is said.
    """

    def read(path: Path) -> tuple[PyTree, dict[str, Any]]:
        tree = stored_tree(path)
        _check(path, named_leaves(tree), template, whole=True)
        state = _restore(path, template, partial=False)
        check_values(path, tree, named_leaves(state))
        return state, _metadata(path)

    return _read(folder, step, read)


def restore_params(folder: str | Path, step: int | None, template: PyTree) -> PyTree:
    """Only the trained parts, ``state["params"]``, of a step (None: the newest).

    Reads nothing of the optimizer. A dtype other than the stored one casts.

    Args:
      template: structure of the params, as for :func:`restore_state`. Parts of the checkpoint
        that it does not name are left out.

    Raises:
      CheckpointError, DamagedCheckpoint: as for :func:`restore_state`.
    """

    def read(path: Path) -> PyTree:
        tree = stored_tree(path)
        _check(path, named_leaves(tree), {"params": template}, whole=False)
        restored = _restore(path, {"params": template}, partial=True)
        check_values(path, tree, named_leaves(restored))
        return restored["params"]

    return _read(folder, step, read)


def _read(folder: str | Path, step: int | None, read: Callable[[Path], _T]) -> _T:
    """What ``read`` gives of a step's folder; where that is damaged, what can be done about it."""
    path = _step_folder(folder, step)
    storage_path(path)  # a name that Orbax would read otherwise is no damage
    try:
        with quiet_storage():
            return read(path)
    except Exception as error:
        if not is_damage(error):
            raise
        raise _damaged(path, reason_of(error, path)) from error


def _damaged(path: Path, problem: str) -> DamagedCheckpoint:
    earlier = [step for step in reversed(all_steps(path.parent)) if step < int(path.name)]
    whole = (step for step in earlier if _is_whole(path.parent / str(step)))
    return DamagedCheckpoint(path, problem, next(whole, None))


def _is_whole(path: Path) -> bool:
    """Whether all of a checkpoint can be read. One array at a time: this is no place to run out of
    memory."""
    try:
        with quiet_storage():
            _metadata(path)
            tree = stored_tree(path)
            for name in named_leaves(tree):
                check_values(path, tree, stored_arrays(path, tree, {name}))
    except Exception as error:
        if not is_damage(error):
            raise
        return False
    return metrics_problem(path) is None


def _metadata(path: Path) -> dict[str, Any]:
    return stored_json(path, METADATA)


def step_of(folder: str | Path, step: int | None) -> int:
    """A step that is there (None: the newest).

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    return int(_step_folder(folder, step).name)


def _step_folder(folder: str | Path, step: int | None) -> Path:
    steps = all_steps(folder)
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {folder}: give the checkpoint folder of a run that has saved one "
            "(train.init_from, or run_dir of a run to resume)"
        )
    if step is not None and step not in steps:
        raise CheckpointError(
            f"no checkpoint of step {step} in {folder}: it has {', '.join(map(str, steps))}"
        )
    return local_path(folder) / str(steps[-1] if step is None else step)


def _check(path: Path, stored: Mapping[str, Any], template: PyTree, *, whole: bool) -> None:
    expected = named_leaves(template)
    problems = [f"{name} is not in the checkpoint" for name in expected if name not in stored]
    for name in expected.keys() & stored.keys():
        ours, theirs = expected[name], stored[name]
        if tuple(ours.shape) != tuple(theirs.shape):
            problems.append(f"{name} has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
        elif whole and ours.dtype != theirs.dtype:
            problems.append(f"{name} has dtype {theirs.dtype}, not {ours.dtype}")
    if whole:
        problems += [
            f"{name} is only in the checkpoint" for name in stored.keys() - expected.keys()
        ]
    if not problems:
        return
    shown = sorted(problems)[:12]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    raise CheckpointError(
        f"the checkpoint {path} was saved by a run of another configuration:\n"
        + "\n".join(f"  - {problem}" for problem in shown)
        + "\nUse the config.json of that run, point train.init_from at another checkpoint, or "
        "start afresh in another run_dir."
    )


def _restore(path: Path, template: PyTree, *, partial: bool) -> PyTree:
    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        # Without a sharding Orbax would ask for the devices of the run that saved.
        sharding = getattr(leaf, "sharding", None)
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    item = jax.tree.map(abstract, template)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            storage_path(path) / STATE,
            args=ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=partial,
            ),
        )
