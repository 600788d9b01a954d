"""A profile of some training steps, with the program that they ran.

``<run_dir>/profile/<stage>`` gets what ``jax.profiler`` writes (xprof and TensorBoard read it) and
``hlo.txt``, the compiled step: it gives the phase (``jax.named_scope``) of each operation.
``scripts/profile_summary.py`` reads both. Each process writes to a folder of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from conlens_jax.config import ProfileConfig
from conlens_jax.parallel.processes import is_first
from conlens_jax.training.state import Stage

HLO_FILE = "hlo.txt"


class StepProfile:
    """Profiles the steps of a stage that are in ``profile.steps``; the first step is 1.

    Args:
      compiled: the stage's step.
    """

    def __init__(
        self, config: ProfileConfig, folder: Path, stage: Stage, compiled: jax.stages.Compiled
    ):
        first, last = config.steps
        self._first = max(first - stage.first_step, 1)
        self._last = min(last - stage.first_step, stage.steps)
        self._folder, self._compiled = folder / stage.name, compiled
        self._running = False

    def before(self, index: int) -> None:
        """Starts the profile if the step with this 0-based index is the first to be profiled."""
        if self._running or not self._first <= index + 1 <= self._last:
            return
        if is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / HLO_FILE).write_text(self._compiled.as_text(), encoding="utf-8")
        jax.profiler.start_trace(str(self._folder))
        self._running = True

    def after(self, index: int, outputs: Any) -> None:
        """Stops after the last step, when the devices are done with it."""
        if self._running and index + 1 == self._last:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self._running = False
