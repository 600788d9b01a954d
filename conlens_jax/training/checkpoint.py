"""Checkpoints of a run: written atomically, the newest and the best kept, restored on any mesh.

A folder contains one sub-folder per step: ``<step>/state`` (arrays, Orbax), ``<step>/metadata``,
``<step>/metrics`` and ``<step>/checksums`` (JSON). Orbax writes under a temporary name and renames
at the end, so a folder with a step's name is complete. A run writes through :class:`Checkpoints`;
the functions that read (:func:`restore_params`, :func:`read_metadata`, :func:`all_steps`) need only
the folder and do not disturb a run that is writing. The values read are compared with the
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
from jaxtyping import PyTree

from conlens_jax.files.paths import local_path
from conlens_jax.models.param_table import named_leaves
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
    quiet_storage,
    reason_of,
    storage_path,
    stored_arrays,
    stored_json,
    stored_metrics,
    stored_tree,
)
from conlens_jax.training.checksums import checksums

_STEP = re.compile(r"[0-9]+")

CHECKPOINT_METRIC = "kl_at_sampled"
"""The validation score that checkpoints are ranked by; lower is better."""
_T = TypeVar("_T")


class Checkpoints:
    """The checkpoints of one run, for the processes that write them.

    Saving continues in the background while training goes on; leaving the ``with`` block, or
    :meth:`close`, waits for the last save. It keeps the newest ``keep_latest``, the ``keep_best``
    with the lowest ``metric`` and, if they were saved, the steps in ``keep_steps``. The first
    checkpoint of a folder is read back before training continues, see
    :class:`~conlens_jax.training.checkpoint_storage.ReadBack`.

    Args:
      folder: created if needed. Incomplete checkpoints of a killed run are removed.
      keep_latest: at least 1.
      keep_best: the number kept by metric; those saved without a finite one do not count.
      metric: key of ``metrics`` in :meth:`save`; lower is better.
      keep_steps: steps that are never deleted, such as the last one of the warm start.

    Raises:
      CheckpointError: the storage cannot use the folder's name, or a checkpoint in it is damaged.
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
        logger.addFilter(_is_news)  # adding it twice has no effect
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
                # Orbax writes metrics only if this is set; the policy decides what to keep.
                best_fn=lambda metrics: _value(metrics, metric),
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
        """Starts writing a checkpoint; returns whether one is written.

        The arrays are copied before the call returns, so the caller may donate them.

        Args:
          step: optimizer steps done; names the checkpoint.
          state: a pytree of arrays (no strings, no typed PRNG keys).
          metadata: JSON values.
          metrics: scalars; with ``metric`` among them the checkpoint is ranked.
          force: overwrite an existing step; otherwise it stays and False is returned.

        Raises:
          CheckpointError: the first checkpoint of the folder, read back, differs from ``state``.
        """
        self._manager.wait_until_finished()
        if step in self._manager.all_steps():
            if not force:
                return False
            self._manager.delete(step)
        record = ReadBack(state) if self._reads_back else None
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
        if record is not None and saved:
            self._manager.wait_until_finished()
            record.check(self.folder / str(step))
            self._reads_back = False
        return saved

    def all_steps(self) -> list[int]:
        """The complete checkpoints, in increasing order."""
        self.wait()
        return all_steps(self.folder)

    def restore(self, step: int | None, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The state and the metadata of a step (None: the newest).

        See :func:`restore_state`.
        """
        self.wait()
        return restore_state(self.folder, step, template)

    def wait(self) -> None:
        """Waits until everything is on disk; raises the errors of the background work."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and ends the background work; without it that save is lost."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # While an error propagates, a failing save adds nothing: mostly it is the same full disk.
        with contextlib.suppress(*(() if error is None else (OSError, ValueError))):
            self.close()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to print a log record. Orbax logs each error of its threads with a page of trace; the
    next save or wait raises the same error."""
    return not (record.exc_info and "orbax" in record.pathname)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its check for preemption: only the training loop checks, see
    :mod:`conlens_jax.parallel.preemption`."""

    def reached_preemption(self, step: int) -> bool:
        return False


class _Preserve:
    """Keeps the newest, best and named checkpoints (an Orbax preservation policy)."""

    def __init__(self, newest: int, best: int, metric: str, steps: frozenset[int]):
        self._newest, self._best, self._metric, self._steps = newest, best, metric, steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        values = {info.step: _value(info.metrics, self._metric) for info in checkpoints}
        keep = set(sorted(values)[-self._newest :]) | self._steps
        keep.update(_best_first(values)[: self._best])
        return [info.step in keep for info in checkpoints]


def _value(metrics: Mapping[str, float] | None, name: str) -> float:
    """The metric to minimise; infinite where it is absent or not finite."""
    value = (metrics or {}).get(name, math.inf)
    return value if math.isfinite(value) else math.inf


def _best_first(values: Mapping[int, float]) -> list[int]:
    """The steps with a finite value, the lowest value first; among equals the newest."""
    finite = [step for step in values if math.isfinite(values[step])]
    return sorted(finite, key=lambda step: (values[step], -step))


# --- reading ------------------------------------------------------------------------------------


def all_steps(folder: str | Path) -> list[int]:
    """The complete checkpoints of a folder in increasing order; empty if there is no folder."""
    folder = local_path(folder)
    if not folder.is_dir():
        return []
    return sorted(
        int(child.name)
        for child in folder.iterdir()
        if _STEP.fullmatch(child.name) and (child / STATE).is_dir()
    )


def best_step(folder: str | Path, metric: str = CHECKPOINT_METRIC) -> int | None:
    """The checkpoint whose recorded metric is the lowest; None where none has a finite one."""
    folder = local_path(folder)
    metrics = {step: stored_metrics(folder / str(step)) for step in all_steps(folder)}
    ranked = _best_first({step: _value(found, metric) for step, found in metrics.items()})
    return ranked[0] if ranked else None


def read_metadata(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """The metadata of a step (None: the newest).

    Raises:
      CheckpointError: there is no such checkpoint.
      DamagedCheckpoint: it cannot be read; the message names the newest one before it that can.
    """
    return _read(folder, step, _metadata)


def any_metadata(folder: str | Path) -> dict[str, Any]:
    """The metadata of the newest step whose metadata can be read; empty if there is none. For
    entries that are the same in all steps."""
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
        sharding is that of the restored array; the mesh it was saved from does not matter.

    Raises:
      CheckpointError: there is no such checkpoint, or names, shapes or dtypes of the template
        differ from it (the message lists them).
      DamagedCheckpoint: it cannot be read; the message names the newest one before it that can.
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

    The optimizer's state is not read. Arrays are cast to the template's dtypes.

    Args:
      template: structure of the params, as for :func:`restore_state`. Parts of the checkpoint
        that are not in it are skipped.

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
    """The result of ``read`` on a step's folder; if that is damaged, an error with the fix."""
    path = _step_folder(folder, step)
    storage_path(path)  # a name that Orbax misreads is not damage
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
    """Whether all of a checkpoint can be read; one array at a time, to save memory."""
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
    """An existing step (None: the newest).

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
        "start again in another run_dir."
    )


def _restore(path: Path, template: PyTree, *, partial: bool) -> PyTree:
    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        # Without a sharding Orbax requires the devices of the run that saved.
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
