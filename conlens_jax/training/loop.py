"""Training: the stages in order, each resumed from its last checkpoint.

Steps are counted over the whole run: the warm start is steps 0 … warm.steps − 1, then the joint
stage. The supervised control starts from the same weights as the joint stage, in its own folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from conlens_jax.config import to_json_dict
from conlens_jax.data.batches import read_groups, steps_per_epoch
from conlens_jax.files.paths import local_path
from conlens_jax.lens.spec import init_lens
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.processes import first_before_others, is_first
from conlens_jax.tracking.wandb_run import WandbRun
from conlens_jax.training.accounting import parameter_table, stored_table
from conlens_jax.training.checkpoint import CHECKPOINT_METRIC, Checkpoints, read_metadata
from conlens_jax.training.checkpoint_storage import CheckpointError
from conlens_jax.training.places import places_of
from conlens_jax.training.run import Run, placed, placed_frozen
from conlens_jax.training.run_folder import BASELINE, CONTROL, claim_folder
from conlens_jax.training.session import Session
from conlens_jax.training.stage_log import StageLog
from conlens_jax.training.stage_loop import StageLoop
from conlens_jax.training.starting_lens import starting_lens
from conlens_jax.training.state import (
    Stage,
    TrainState,
    init_state,
    make_step,
    stage_optimizer,
    stages_of,
)


def train_lens(session: Session) -> Path:
    """Trains the lens of a config: warm start, joint stage, control and baseline.

    Returns:
      The run folder, with ``config.json``, ``metrics.jsonl`` and ``checkpoints/``.

    Raises:
      ValueError: the caches or an existing run do not match the config.
      TrainingStopped: too many consecutive steps were not finite, or the disk is full.
    """
    config, console = session.config, session.console
    folder = local_path(config.run_dir)
    with first_before_others("run folder"):
        metadata = claim_folder(folder, config, write=is_first(), model=session.model)
    (train, validation), reference = session.caches, session.reference
    tracker = WandbRun(
        config.wandb, folder, to_json_dict(config), enabled=is_first(), console=console
    )
    places = places_of(config, session.model, folder)
    run = Run(
        session,
        folder,
        train,
        validation,
        reference,
        session.measurer(),
        tracker,
        places,
        trained_on=session.trained_on,
    )
    trainable, frozen = init_lens(
        session.model.params,
        session.spec,
        reference.mean_D,
        reference.scale,
        seed=config.train.seed,
    )
    trainable, frozen = placed(trainable, session), placed_frozen(frozen, session)
    # The baseline starts from the same encoder. Without a baseline the arrays can be freed.
    initial_encoder = trainable["encoder"] if config.baseline.steps else {}
    # A run resumed after its warm start does not need its initial weights.
    if config.train.init_from and not (metadata and config.warm.steps):
        trainable = starting_lens(config.train.init_from, trainable, reference)
    console.table("lens", *parameter_table(trainable, frozen, session.spec))
    warm, joint = stages_of(config)
    try:
        trainable = run_stage(run, warm, trainable, frozen)
        frozen = {**frozen, "warm_decoder": trainable["decoder"]}
        start = trainable
        run = dataclasses.replace(run, warm_encoder=start["encoder"])
        run_stage(run, joint, trainable, frozen)
        if config.control.enabled and joint.steps:
            control = _control_stage(run, warm, joint)
            run_stage(dataclasses.replace(run, folder=folder / CONTROL), control, start, frozen)
        if config.baseline.steps:
            _train_baseline(run, initial_encoder, frozen)
    finally:
        tracker.finish()
    return folder


def _train_baseline(run: Run, encoder: Params, frozen: Params) -> None:
    """Trains a separate encoder on the true last T source tokens."""
    config, session = run.config, run.session
    window = dataclasses.replace(config.warm, before=config.lens.text_len, after=0)
    objective = dataclasses.replace(session.objective, warm=window, target="window")
    stage = Stage(
        BASELINE, config.baseline.steps, config.baseline.batch_size, config.baseline.optimizer
    )
    alone = dataclasses.replace(
        run,
        folder=run.folder / BASELINE,
        session=dataclasses.replace(session, objective=objective),
    )
    run_stage(alone, stage, {"decoder": {}, "encoder": encoder}, frozen)


def run_stage(run: Run, stage: Stage, trainable: Params, frozen: Params) -> Params:
    """Runs one stage, from its last checkpoint if there is one, and returns the trained parts.

    The stage works on a copy: the arrays of ``trainable`` are not donated.
    """
    if stage.steps == 0:
        return trainable
    config, console = run.config, run.console
    groups_nk = read_groups(run.train, stage.rows_per_document)
    n_rows = groups_nk.size
    steps_per_epoch(n_rows, stage.batch_size)  # raises if there is less than one batch
    optimizer = stage_optimizer(stage, trainable, n_rows)
    state = placed(init_state(jax.tree.map(jnp.copy, trainable), optimizer), run.session)
    console.table(f"{stage.name}: stored on each device", *stored_table(state, frozen))
    last_step = stage.first_step + stage.steps
    with Checkpoints(
        run.checkpoint_folder,
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best,
        metric=CHECKPOINT_METRIC,
        keep_steps=(config.warm.steps, last_step),
    ) as checkpoints:
        state, seconds = _resume(run, stage, checkpoints, state)
        if int(state.step) == stage.steps:
            return placed(state.params, run.session)
        log = StageLog(run.folder, stage.name, run.tracker, enabled=is_first())
        log.truncate_after(stage.first_step + int(state.step))
        step = make_step(
            stage,
            run.session.objective,
            optimizer,
            seed=config.train.seed,
            n_rows=n_rows,
            state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
        )
        loop = StageLoop(run, stage, checkpoints, log, frozen, groups_nk, seconds)
        state = loop.train(step, state)
        loop.wait_for_checkpoints()
    console.line(stage.name, finished=last_step, train_seconds=loop.seconds)
    return placed(state.params, run.session)


def _resume(
    run: Run, stage: Stage, checkpoints: Checkpoints, state: TrainState
) -> tuple[TrainState, float]:
    """The newest state of this stage and its compute in seconds, or the initial state and 0."""
    first, last = stage.first_step, stage.first_step + stage.steps
    steps = [step for step in checkpoints.all_steps() if first < step <= last]
    finished_later = [step for step in checkpoints.all_steps() if step > last]
    if not steps:
        if finished_later:
            raise CheckpointError(
                f"{checkpoints.folder} has checkpoints after the {stage.name} stage but none of "
                f"its end, step {last}; start again in another run_dir"
            )
        return state, 0.0
    step = last if last in steps else steps[-1]
    state, metadata = checkpoints.restore(step, state)
    run.console.line(stage.name, resumed_from=checkpoints.folder / str(step))
    return state, float(metadata["train_seconds"])


def _control_stage(run: Run, warm: Stage, joint: Stage) -> Stage:
    """The control stage: as many supervised steps as take the compute of the joint stage."""
    steps = run.config.control.steps
    if not steps:
        warm_seconds, joint_seconds = _stage_seconds(run, warm), _stage_seconds(run, joint)
        steps = max(round(warm.steps * joint_seconds / warm_seconds), 1)
        run.console.line(
            CONTROL,
            steps=steps,
            joint_seconds=joint_seconds,
            warm_step_seconds=warm_seconds / warm.steps,
        )
    return Stage(
        CONTROL, steps, warm.batch_size, run.config.control.optimizer, first_step=warm.steps
    )


def _stage_seconds(run: Run, stage: Stage) -> float:
    last = stage.first_step + stage.steps
    return float(read_metadata(run.checkpoint_folder, last)["train_seconds"])
