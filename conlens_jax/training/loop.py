"""The training loop: stages one after the other, checkpoints, validation, and going on after a
kill.

Steps are counted over the whole run: the warm start is steps 0 … warm.steps − 1, the joint stage
follows. The supervised control starts where the joint stage starts, in a folder of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conlens_jax.config import ExperimentConfig, to_json_dict
from conlens_jax.data.batches import grouped_batch, prefetch, read_groups, steps_per_epoch
from conlens_jax.data.rows import RowSource
from conlens_jax.evaluation.measure import Measurer, Reference
from conlens_jax.lens.batch import read_batch
from conlens_jax.lens.sharding import lens_shardings
from conlens_jax.lens.spec import init_lens
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.mesh import batch_sharding
from conlens_jax.parallel.preemption import Preempted, watching_for_sigterm
from conlens_jax.parallel.processes import first_before_others, is_first, stopping_with_others
from conlens_jax.training.accounting import parameter_table, stored_table
from conlens_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    all_steps,
    read_metadata,
)
from conlens_jax.training.console import Console
from conlens_jax.training.profile import StepProfile
from conlens_jax.training.run_folder import BASELINE, CONTROL, claim_folder, load_lens
from conlens_jax.training.setting import Setting
from conlens_jax.training.stage_log import StageLog
from conlens_jax.training.state import (
    Stage,
    TrainState,
    init_state,
    make_step,
    stage_optimizer,
    stages_of,
)
from conlens_jax.training.validation import Validation, validate, verbose_samples
from conlens_jax.training.wandb_run import WandbRun

CHECKPOINT_METRIC = "kl_at_sampled"


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message names the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder with everything its stages share; ``warm_encoder`` is the encoder as the warm
    start left it, once that is over."""

    setting: Setting
    folder: Path
    train: RowSource
    validation: RowSource
    reference: Reference
    measurer: Measurer
    tracker: WandbRun
    warm_encoder: Params | None = None

    @property
    def config(self) -> ExperimentConfig:
        return self.setting.config

    @property
    def console(self) -> Console:
        return self.setting.console

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"


def train_lens(setting: Setting) -> Path:
    """Trains a lens as the config says: warm start, joint stage, control and baseline.

    Returns:
      The run folder, with ``config.json``, ``metrics.jsonl`` and ``checkpoints/``.

    Raises:
      ValueError: caches or an existing run that do not fit the config.
      TrainingStopped: too many steps in a row were not finite.
    """
    config, console = setting.config, setting.console
    folder = Path(config.run_dir)
    with first_before_others("run folder"):
        claim_folder(folder, config, write=is_first())
    (train, validation), reference = setting.caches, setting.reference
    tracker = WandbRun(
        config.wandb, folder, to_json_dict(config), enabled=is_first(), console=console
    )
    run = Run(setting, folder, train, validation, reference, setting.measurer(), tracker)
    trainable, frozen = init_lens(
        setting.model.params,
        setting.spec,
        reference.mean_D,
        reference.scale,
        seed=config.train.seed,
    )
    trainable, frozen = placed(trainable, setting), placed_frozen(frozen, setting)
    # The baseline starts from the same encoder; without one, nothing keeps the arrays alive.
    initial_encoder = trainable["encoder"] if config.baseline.steps else {}
    if config.train.init_from:
        trainable = load_lens(config.train.init_from, trainable)
    console.table("lens", *parameter_table(trainable, frozen, setting.spec))
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
    """Trains an encoder of its own on the true last T source tokens."""
    config, setting = run.config, run.setting
    window = dataclasses.replace(config.warm, before=config.lens.text_len, after=0)
    objective = dataclasses.replace(setting.objective, warm=window)
    stage = Stage(
        BASELINE, config.baseline.steps, config.baseline.batch_size, config.baseline.optimizer
    )
    alone = dataclasses.replace(
        run,
        folder=run.folder / BASELINE,
        setting=dataclasses.replace(setting, objective=objective),
    )
    run_stage(alone, stage, {"decoder": {}, "encoder": encoder}, frozen)


def run_stage(run: Run, stage: Stage, trainable: Params, frozen: Params) -> Params:
    """Runs one stage, from its last checkpoint where there is one, and returns the trained parts.

    The arrays of ``trainable`` stay usable; the stage works on a copy.
    """
    if stage.steps == 0:
        return trainable
    config, console = run.config, run.console
    groups_nk = read_groups(run.train, stage.rows_per_document)
    n_rows = groups_nk.size
    steps_per_epoch(n_rows, stage.batch_size)  # raises where there is not one batch
    optimizer, learning_rate = stage_optimizer(stage, trainable, n_rows)
    state = placed(init_state(jax.tree.map(jnp.copy, trainable), optimizer), run.setting)
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
            return placed(state.params, run.setting)
        log = StageLog(run.folder, stage.name, run.tracker, enabled=is_first())
        log.truncate_after(stage.first_step + int(state.step))
        step = make_step(
            stage,
            config,
            run.setting.objective,
            optimizer,
            learning_rate,
            n_rows,
            state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
        )
        loop = _StageLoop(run, stage, checkpoints, log, frozen, groups_nk, seconds)
        state = loop.run(step, state)
        loop.wait_for_checkpoints()
    console.line(stage.name, finished=last_step, train_seconds=loop.seconds)
    return placed(state.params, run.setting)


def placed(tree: Any, setting: Setting) -> Any:
    """A lens or its train state on the mesh, see
    :func:`~conlens_jax.lens.sharding.lens_shardings`. What is restored into such a tree is on
    the mesh too."""
    return jax.device_put(tree, lens_shardings(tree, setting.model.config, setting.mesh))


def placed_frozen(frozen: Params, setting: Setting) -> Params:
    """The frozen parts on the mesh; the original model is there already."""
    small = {name: part for name, part in frozen.items() if name != "original"}
    return {"original": frozen["original"], **placed(small, setting)}


class _StageLoop:
    """One pass through the steps of a stage.

    ``seconds`` is the compute time of its steps, without compilation, validation and checkpoints:
    CPU time of the process on a CPU, wall-clock time on an accelerator.
    """

    def __init__(
        self,
        run: Run,
        stage: Stage,
        checkpoints: Checkpoints,
        log: StageLog,
        frozen: Params,
        groups_nk: np.ndarray,
        seconds: float,
    ):
        self.run_, self.stage, self.checkpoints, self.log = run, stage, checkpoints, log
        self.frozen, self.groups_nk, self.seconds = frozen, groups_nk, seconds
        self.config, self.console = run.config, run.console
        self.sharding = batch_sharding(run.setting.mesh)
        self._clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def run(self, step, state: TrainState) -> TrainState:
        stage, done = self.stage, int(state.step)
        started = time.time()
        with jax.set_mesh(self.run_.setting.mesh):
            step = step.lower(state, self.frozen, self._read(done)).compile()
        batches = prefetch(self._read, range(done, stage.steps))
        profile = StepProfile(self.config.profile, self.run_.folder / "profile", stage, step)
        with (
            self.console.progress(stage.steps, stage.name, initial=done) as progress,
            watching_for_sigterm() as stops_behind,
            stopping_with_others(),
        ):
            mark = self._clock()
            for index, batch in batches:
                profile.before(index)
                state, metrics = step(state, self.frozen, batch)
                profile.behind(index, metrics)
                if index == done:
                    jax.block_until_ready(metrics)
                    self.console.line(stage.name, seconds_to_first_step=time.time() - started)
                here = index + 1
                stops = stops_behind(stage.first_step + here)
                if not (stops or self._pauses(here)):
                    progress.update(1)
                    continue
                metrics = {name: float(value) for name, value in metrics.items()}
                self.seconds += self._clock() - mark
                progress.update(1, **_shown(metrics))
                self._pause(here, state, metrics)
                if stops:
                    self._leave(here, state)
                mark = self._clock()
        return state

    def _read(self, index: int):
        seed, here = self.config.train.seed, self.stage.first_step + index
        size = self.stage.batch_size
        indices_B = grouped_batch(self.groups_nk, size, seed, here)
        return read_batch(self.run_.train, indices_B, self.sharding, self.stage.rows_per_document)

    def _pauses(self, here: int) -> bool:
        """Whether the host has something to do behind this step."""
        train, checkpoint = self.config.train, self.config.checkpoint
        step = self.stage.first_step + here
        every = (train.log_every, train.validate_every, train.sample_every, checkpoint.every)
        return here == self.stage.steps or any(step % interval == 0 for interval in every)

    def _pause(self, here: int, state: TrainState, metrics: dict[str, float]) -> None:
        train, stage = self.config.train, self.stage
        step, last = stage.first_step + here, here == stage.steps
        self._stop_if_diverged(step, metrics)
        if last or step % train.log_every == 0:
            self.log.numbers(step, {**metrics, "train_seconds": self.seconds})
            self.console.line(stage.name, step=step, **_shown(metrics))
        scores = {}
        if stage.writes_text and (last or step % train.validate_every == 0):
            scores = self._validate(step, state).scores
        if stage.writes_text and (last or step % train.sample_every == 0):
            self._samples(step, state)
        if last or step % self.config.checkpoint.every == 0:
            self._save(step, state, scores)

    def _leave(self, here: int, state: TrainState) -> None:
        """Saves, whatever step it is, and raises what ends the run."""
        step = self.stage.first_step + here
        self._save(step, state, {})
        self.wait_for_checkpoints()
        raise Preempted(
            f"SIGTERM: saved behind step {step} in {self.checkpoints.folder}; the same command "
            "goes on from there"
        )

    def _validate(self, step: int, state: TrainState) -> Validation:
        validation = validate(self.run_, state.params, self.frozen)
        scores = {f"validation_{name}": value for name, value in validation.scores.items()}
        self.log.numbers(step, scores)
        self.log.distributions(step, validation.distributions, validation.token_shares)
        self.console.line(
            "validation", step=step, **validation.scores, common=validation.common_tokens
        )
        if validation.warning and not self.stage.supervised:
            self.console.line(self.stage.name, step=step, warning=validation.warning)
        return validation

    def _samples(self, step: int, state: TrainState) -> None:
        count = self.config.train.n_verbose_samples
        if not count:
            return
        samples = verbose_samples(self.run_, state.params, self.frozen, count)
        self.console.block(f"samples at step {step}", "\n\n".join(s.text() for s in samples))
        self.log.samples(step, samples)

    def _save(self, step: int, state: TrainState, scores: Mapping[str, float]) -> None:
        metadata = {
            "step": step,
            "stage": self.stage.name,
            "train_seconds": self.seconds,
            "model_id": self.run_.setting.model.model_id,
            "weights_hash": self.run_.setting.model.weights_hash,
            "layer": self.run_.setting.spec.layer,
            "statistics": {
                "mean": self.run_.reference.mean_D.tolist(),
                "scale": self.run_.reference.scale,
                "resultant": self.run_.reference.resultant,
            },
            "config": to_json_dict(self.config),
        }
        # The warm start is not judged by its text: only joint checkpoints compete for the best.
        metrics = {} if self.stage.name == "warm" else scores
        with self._disk_failure_stops(f"the checkpoint of step {step}, or the one before it,"):
            self.checkpoints.save(step, state, metadata, metrics)

    def wait_for_checkpoints(self) -> None:
        """Returns when the last checkpoint is on disk."""
        with self._disk_failure_stops("the last checkpoint"):
            self.checkpoints.wait()

    @contextlib.contextmanager
    def _disk_failure_stops(self, what: str) -> Iterator[None]:
        # A full disk met in the background comes as a ValueError, with the next save or wait.
        try:
            yield
        except (OSError, ValueError) as error:
            raise TrainingStopped(
                f"{what} could not be written: {error}; "
                f"{self._last_good()} Make room and run the same command again."
            ) from error

    def _stop_if_diverged(self, step: int, metrics: Mapping[str, float]) -> None:
        bad = int(metrics["bad_steps_in_a_row"])
        if bad:
            self.console.line(self.stage.name, step=step, warning=f"{bad} non-finite steps skipped")
        if bad >= self.stage.optimizer.max_bad_steps:
            raise TrainingStopped(
                f"{self.stage.name}: the last {bad} steps up to {step} had a loss or gradient that "
                f"is not finite (optimizer.max_bad_steps={self.stage.optimizer.max_bad_steps}); "
                f"{self._last_good()} Lower optimizer.learning_rate or raise loss.tau."
            )

    def _last_good(self) -> str:
        with contextlib.suppress(OSError, ValueError):  # of a save that failed
            self.checkpoints.wait()
        steps = all_steps(self.checkpoints.folder)
        if not steps:
            return "no checkpoint was written yet."
        return f"the last good checkpoint is {self.checkpoints.folder / str(steps[-1])}."


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few numbers that belong on a line."""
    names = ("loss", "read_error", "write_loss", "mse", "kl", "lm", "text", "entropy", "grad_norm")
    return {name: metrics[name] for name in names if name in metrics}


def _resume(
    run: Run, stage: Stage, checkpoints: Checkpoints, state: TrainState
) -> tuple[TrainState, float]:
    """The newest state of this stage and the compute it has cost, or the given one and 0."""
    first, last = stage.first_step, stage.first_step + stage.steps
    steps = [step for step in checkpoints.all_steps() if first < step <= last]
    finished_later = [step for step in checkpoints.all_steps() if step > last]
    if not steps:
        if finished_later:
            raise CheckpointError(
                f"{checkpoints.folder} has checkpoints behind the {stage.name} stage but none of "
                f"its end, step {last}; start afresh in another run_dir"
            )
        return state, 0.0
    step = last if last in steps else steps[-1]
    state, metadata = checkpoints.restore(step, state)
    run.console.line(stage.name, resumed_from=checkpoints.folder / str(step))
    return state, float(metadata["train_seconds"])


def _control_stage(run: Run, warm: Stage, joint: Stage) -> Stage:
    """As many supervised steps as the joint stage's compute pays for."""
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
