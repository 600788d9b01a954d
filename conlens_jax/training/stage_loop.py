"""The steps of one stage: batches, logs, validation, checkpoints, and the ways out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from conlens_jax.config import to_json_dict
from conlens_jax.data.batches import grouped_batch, prefetch
from conlens_jax.data.device_batches import read_batch
from conlens_jax.files.whole import reason_of
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.mesh import batch_sharding
from conlens_jax.parallel.preemption import Preempted, watching_for_sigterm
from conlens_jax.parallel.processes import stopping_with_others
from conlens_jax.training.checkpoint import CheckpointError, Checkpoints, all_steps
from conlens_jax.training.profile import StepProfile
from conlens_jax.training.run import Run
from conlens_jax.training.stage_log import StageLog
from conlens_jax.training.state import Stage, TrainState
from conlens_jax.training.stopped import TrainingStopped
from conlens_jax.training.validation import Validation, validate, verbose_samples


class StageLoop:
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
        self.sharding = batch_sharding(run.session.mesh)
        self._clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def run(self, step, state: TrainState) -> TrainState:
        stage, done = self.stage, int(state.step)
        started = time.time()
        with jax.set_mesh(self.run_.session.mesh):
            step = step.lower(state, self.frozen, self._read(done)).compile()
        batches = prefetch(self._read, range(done, stage.steps))
        profile = StepProfile(self.config.profile, self.run_.folder / "profile", stage, step)
        with (
            self.console.progress(stage.steps, stage.name, initial=done) as progress,
            watching_for_sigterm(
                f"the {stage.name} stage is over and saved; the same command goes on behind it"
            ) as stops_here,
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
                stops = stops_here()
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
            self.wait_for_checkpoints()
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
            "model_id": self.run_.session.model.model_id,
            "weights_hash": self.run_.session.model.weights_hash,
            "layer": self.run_.session.spec.layer,
            "statistics": {
                "mean": self.run_.reference.mean_D.tolist(),
                "scale": self.run_.reference.scale,
                "resultant": self.run_.reference.resultant,
            },
            "places": {**self.run_.places, "run": str(self.run_.folder)},
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
        except CheckpointError as error:
            raise TrainingStopped(str(error)) from error
        except (OSError, ValueError) as error:
            raise TrainingStopped(
                f"{what} could not be written in {self.checkpoints.folder}: {reason_of(error)}; "
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
    names = (
        "loss",
        "encoder_error",
        "decoder_nll",
        "mse",
        "kl",
        "lm",
        "text",
        "entropy",
        "grad_norm",
    )
    return {name: metrics[name] for name in names if name in metrics}
