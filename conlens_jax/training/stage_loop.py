"""The steps of one stage: batches, periodic work (:class:`Hook`), and early exits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from conlens_jax.config import to_json_dict
from conlens_jax.data.batches import grouped_batch, prefetch
from conlens_jax.data.device_batches import read_batch
from conlens_jax.files.whole import reason_of
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.host import RunAhead
from conlens_jax.parallel.mesh import batch_sharding
from conlens_jax.parallel.preemption import Preempted, watching_for_sigterm
from conlens_jax.parallel.processes import stopping_with_others
from conlens_jax.training.checkpoint import Checkpoints, all_steps
from conlens_jax.training.checkpoint_storage import CheckpointError
from conlens_jax.training.profile import StepProfile
from conlens_jax.training.run import Run
from conlens_jax.training.stage_log import StageLog
from conlens_jax.training.state import Stage, Step, TrainState
from conlens_jax.training.stopped import TrainingStopped
from conlens_jax.training.validation import validate, verbose_samples


class Hook(NamedTuple):
    """Periodic work of the host: ``action(step, state, metrics)`` after every ``every`` steps of
    the run and after the last step of the stage."""

    every: int
    action: Callable[[int, TrainState, Mapping[str, float]], None]


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
        self.run, self.stage, self.checkpoints, self.log = run, stage, checkpoints, log
        self.frozen, self.groups_nk, self.seconds = frozen, groups_nk, seconds
        self.config, self.console = run.config, run.console
        self.sharding = batch_sharding(run.session.mesh)
        self.hooks = self._make_hooks()
        self._scores: dict[str, float] = {}  # of the current step's validation
        self._clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def _make_hooks(self) -> list[Hook]:
        """In the order in which they run: a checkpoint records the scores of its step."""
        train, hooks = self.config.train, [Hook(self.config.train.log_every, self._log_metrics)]
        if self.stage.writes_text:
            hooks.append(Hook(train.validate_every, self._validate))
            hooks.append(Hook(train.sample_every, self._log_samples))
        return [*hooks, Hook(self.config.checkpoint.every, self._save)]

    def train(self, step: Step, state: TrainState) -> TrainState:
        """Runs the stage's remaining steps and returns the last state."""
        stage, first = self.stage, int(state.step)
        started = time.time()
        with jax.set_mesh(self.run.session.mesh):
            step = step.lower(state, self.frozen, self._read(first)).compile()
        profile = StepProfile(self.config.profile, self.run.folder / "profile", stage, step)
        batches = prefetch(self._read, range(first, stage.steps))
        saved = f"the {stage.name} stage is over and saved; the same command continues after it"
        with (
            self.console.progress(stage.steps, stage.name, initial=first) as progress,
            watching_for_sigterm(saved) as stop_requested,
            stopping_with_others(),
        ):
            mark, run_ahead = self._clock(), RunAhead()
            for index, batch in batches:
                profile.before(index)
                # The batch is on the devices already: a copy in every step would be a mistake.
                with jax.transfer_guard_host_to_device("disallow"):
                    state, metrics = step(state, self.frozen, batch)
                run_ahead(metrics)
                profile.after(index, metrics)
                if index == first:
                    jax.block_until_ready(metrics)
                    self.console.line(stage.name, seconds_to_first_step=time.time() - started)
                stops, due = stop_requested(), self._due_hooks(index + 1)
                if not (stops or due):  # the host runs ahead of the devices
                    progress.update(1)
                    continue
                metrics = {name: float(value) for name, value in metrics.items()}
                self.seconds += self._clock() - mark
                progress.update(1, **_shown(metrics))
                self._run_hooks(due, stage.first_step + index + 1, state, metrics)
                if stops:
                    self._save_and_exit(stage.first_step + index + 1, state, metrics)
                mark = self._clock()
            self.wait_for_checkpoints()
        return state

    def _read(self, index: int):
        step, size = self.stage.first_step + index, self.stage.batch_size
        indices_B = grouped_batch(self.groups_nk, size, self.config.train.seed, step)
        return read_batch(self.run.train, indices_B, self.sharding, self.stage.rows_per_document)

    def _due_hooks(self, done: int) -> list[Hook]:
        """The hooks to run after ``done`` steps of the stage."""
        last, step = done == self.stage.steps, self.stage.first_step + done
        return [hook for hook in self.hooks if last or step % hook.every == 0]

    def _run_hooks(
        self, hooks: list[Hook], step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> None:
        self._scores = {}
        self._stop_if_diverged(step, metrics)
        for hook in hooks:
            hook.action(step, state, metrics)

    def _save_and_exit(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        self._save(step, state, metrics)
        self.wait_for_checkpoints()
        raise Preempted(
            f"SIGTERM: saved after step {step} in {self.checkpoints.folder}; the same command "
            "continues from there"
        )

    def _log_metrics(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        self.log.numbers(step, {**metrics, "train_seconds": self.seconds})
        self.console.line(self.stage.name, step=step, **_shown(metrics))

    def _validate(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        validation = validate(self.run, state.params, self.frozen)
        self._scores = validation.scores
        scores = {f"validation_{name}": value for name, value in validation.scores.items()}
        self.log.numbers(step, scores)
        self.log.distributions(step, validation.distributions, validation.token_shares)
        self.console.line(
            "validation", step=step, **validation.scores, common=validation.common_tokens
        )
        if validation.warning and not self.stage.supervised:
            self.console.line(self.stage.name, step=step, warning=validation.warning)

    def _log_samples(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        count = self.config.train.n_verbose_samples
        if not count:
            return
        samples = verbose_samples(self.run, state.params, self.frozen, count)
        self.console.block(f"samples at step {step}", "\n\n".join(s.text() for s in samples))
        self.log.samples(step, samples)

    def _save(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        metadata = {
            "step": step,
            "stage": self.stage.name,
            "train_seconds": self.seconds,
            "model_id": self.run.session.model.model_id,
            "weights_hash": self.run.session.model.weights_hash,
            "layer": self.run.session.spec.layer,
            "statistics": {
                "mean": self.run.reference.mean_D.tolist(),
                "scale": self.run.reference.scale,
                "resultant": self.run.reference.resultant,
            },
            "trained_on": None if self.run.trained_on is None else self.run.trained_on.to_json(),
            "places": {**self.run.places, "run": str(self.run.folder)},
            "config": to_json_dict(self.config),
        }
        # The warm start is not judged by its text: its checkpoints do not compete for the best.
        scores = {} if self.stage.name == "warm" else self._scores
        with self._disk_failure_stops(f"the checkpoint of step {step}, or the one before it,"):
            self.checkpoints.save(step, state, metadata, scores)

    def wait_for_checkpoints(self) -> None:
        """Waits until the last checkpoint is on disk."""
        with self._disk_failure_stops("the last checkpoint"):
            self.checkpoints.wait()

    @contextlib.contextmanager
    def _disk_failure_stops(self, what: str) -> Iterator[None]:
        # Errors of a background save are raised by the next save or wait (a full disk: ValueError).
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
        with contextlib.suppress(OSError, ValueError):  # from a failed save
            self.checkpoints.wait()
        steps = all_steps(self.checkpoints.folder)
        if not steps:
            return "no checkpoint was written yet."
        return f"the last good checkpoint is {self.checkpoints.folder / str(steps[-1])}."


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a console line."""
    names = (
        "loss",
        "encoder_error",
        "decoder_nll",
        "mse",
        "kl",
        "lm",
        "text",
        "entropy",
        "length",
        "grad_norm",
    )
    return {name: metrics[name] for name in names if name in metrics}
