"""Weights & Biases; its errors never stop the training."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conlens_jax.config import WandbConfig
from conlens_jax.files.paths import local_path
from conlens_jax.files.whole import write_whole
from conlens_jax.tracking.console import Console

RUN_ID = "wandb_id.txt"
"""The file in a run folder with the id of its W&B run."""
FINISH_SECONDS = 300.0
"""Maximum time to wait for uploads at the end of a run."""


class WandbRun:
    """A Weights & Biases run whose failures do not stop the training.

    The environment variable ``WANDB_MODE`` overrides ``config.mode``. With ``"disabled"`` wandb is
    never imported. On any error (not installed, not logged in, no network) one line is printed and
    tracking is switched off. The run's id is stored in ``run_dir/wandb_id.txt``, so a resumed
    training and the evaluation continue the same run; a sweep agent sets the id in
    ``WANDB_RUN_ID``. The files of offline mode are in ``run_dir/wandb``.

    Args:
      config_dict: the whole configuration, shown with the run.
      enabled: False does nothing; used in all processes but the first.
    """

    def __init__(
        self,
        config: WandbConfig,
        run_dir: str | Path,
        config_dict: Mapping[str, Any],
        *,
        enabled: bool = True,
        console: Console | None = None,
    ):
        self._console = console or Console()
        self._run: Any = None
        mode = os.environ.get("WANDB_MODE") or config.mode
        if enabled and mode != "disabled":
            self._attempt(lambda: self._start(config, mode, local_path(run_dir), config_dict))

    @property
    def active(self) -> bool:
        """Whether metrics are being tracked."""
        return self._run is not None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Scalars at an optimizer step."""
        if self._run is not None:
            self._attempt(lambda: self._run.log({**metrics, "step": step}))

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """A table, such as verbose samples, at an optimizer step."""

        def log_table() -> None:
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._run.log({name: table, "step": step})

        if self._run is not None:
            self._attempt(log_table)

    def histogram(
        self, name: str, counts: Sequence[int], edges: Sequence[float], step: int
    ) -> None:
        """A histogram given by its counts, at an optimizer step."""

        def log_histogram() -> None:
            import wandb

            self._run.log({name: wandb.Histogram(np_histogram=(counts, edges)), "step": step})

        if self._run is not None:
            self._attempt(log_histogram)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Summary values of the run."""
        if self._run is not None:
            self._attempt(lambda: self._run.summary.update(dict(values)))

    def artifact(self, kind: str, files: Sequence[Path]) -> None:
        """Files of the run, as an artifact ``<kind>-<run id>``."""

        def log_artifact() -> None:
            import wandb

            artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind)
            for file in files:
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)

        if self._run is not None:
            self._attempt(log_artifact)

    def finish(self) -> None:
        """Ends the run; wandb uploads the rest when the process exits, at the latest."""
        if self._run is not None:
            self._attempt(lambda: self._run.finish())
            self._run = None

    def _start(
        self, config: WandbConfig, mode: str, run_dir: Path, config_dict: Mapping[str, Any]
    ) -> None:
        import wandb

        if mode == "online" and not wandb.api.api_key:
            # Without this wandb would prompt on the terminal and block the training.
            raise RuntimeError("no login; run `wandb login`, or set wandb.mode to 'offline'")
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            name=config.name or run_dir.absolute().name,
            id=_run_id(run_dir / RUN_ID),
            resume="allow" if mode == "online" else None,
            dir=str(run_dir),
            config=dict(config_dict),
            mode=mode,
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=30, **_finish_timeout(wandb)
            ),
        )
        # A resumed run logs some steps again, which wandb's built-in step forbids.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        # No error in tracking may stop the run.
        except Exception as error:
            self._run = None
            self._console.line("wandb", warning=f"tracking is off: {error or type(error).__name__}")


def _finish_timeout(wandb: Any) -> dict[str, float]:
    """The setting for the wait at the end of a run. Without a limit wandb retries for days if the
    network is down; what is not uploaded stays in the run folder, for ``wandb sync``. Older
    versions do not have this setting."""
    known = getattr(wandb.Settings, "model_fields", {})
    return {"finish_timeout": FINISH_SECONDS} if "finish_timeout" in known else {}


def _run_id(path: Path) -> str:
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    new = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_whole(path, new + "\n")
    return new
