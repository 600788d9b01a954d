"""Where metrics go: a JSON-lines file in the run folder, and Weights & Biases if it is there."""

from __future__ import annotations

import json
import math
import numbers
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conlens_jax.config import WandbConfig
from conlens_jax.training.console import Console


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, on disk as soon as it is written.

    Every record has ``step`` and ``time`` (Unix seconds). Values that are not finite are written
    as null, since JSON has no NaN.

    Args:
      path: appended to; its folder is made. A last line torn by a kill is removed.
      enabled: False writes nothing, for all processes but the first.
    """

    def __init__(self, path: str | Path, *, enabled: bool = True):
        self.path = Path(path)
        self._enabled = enabled
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if _has_torn_line(self.path):
                self._rewrite(read_metrics(self.path))

    def write(self, step: int, **values: Any) -> None:
        """Appends one record, such as ``write(120, stage="joint", loss=1.2)``."""
        if not self._enabled:
            return
        record = {"step": step, "time": round(time.time(), 3), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_to_json(record) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drops the records of steps after ``step``, those that a resumed run will write anew."""
        if self._enabled and self.path.exists():
            self._rewrite([record for record in read_metrics(self.path) if record["step"] <= step])

    def _rewrite(self, records: Sequence[Mapping[str, Any]]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(_to_json(r) + "\n" for r in records), encoding="utf-8")
        temporary.replace(self.path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line torn by a kill is left out.

    Raises:
      ValueError: another line is not JSON.
    """
    # What follows the last newline is empty, or torn.
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON; remove the line, or the file: {error}"
            ) from error
    return records


class WandbRun:
    """A Weights & Biases run that can fail without failing the training.

    The environment's ``WANDB_MODE`` wins over ``config.mode``. With ``"disabled"`` wandb is never
    imported. Whatever goes wrong (not installed, not logged in, no network) is said in one line on
    the console, and tracking is off from there on. The run's id is kept in
    ``run_dir/wandb_id.txt``, so a resumed training goes on in the same run; the files of the
    offline mode are in ``run_dir/wandb``.

    Args:
      config_dict: the whole configuration, shown beside the run.
      enabled: False does nothing, for all processes but the first.
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
            self._attempt(lambda: self._start(config, mode, Path(run_dir), config_dict))

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

    def finish(self) -> None:
        """Ends the run; wandb writes what is left at the latest when the process exits."""
        if self._run is not None:
            self._attempt(lambda: self._run.finish())
            self._run = None

    def _start(
        self, config: WandbConfig, mode: str, run_dir: Path, config_dict: Mapping[str, Any]
    ) -> None:
        import wandb

        if mode == "online" and not wandb.api.api_key:
            # Without this wandb would ask on the terminal and hold the training up.
            raise RuntimeError("no login; run `wandb login`, or set wandb.mode to 'offline'")
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            name=config.name or run_dir.absolute().name,
            id=_run_id(run_dir / "wandb_id.txt"),
            resume="allow" if mode == "online" else None,
            dir=str(run_dir),
            config=dict(config_dict),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        # A resumed run writes steps of before the kill again, which wandb's own step forbids.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        # Tracking is a guest of the training: no error of its many kinds may end the run.
        except Exception as error:
            self._run = None
            self._console.line("wandb", warning=f"tracking is off: {error or type(error).__name__}")


def _run_id(path: Path) -> str:
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    new = secrets.token_hex(4)
    path.write_text(new + "\n", encoding="utf-8")
    return new


def _has_torn_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _to_json(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON's own types: scalars of NumPy and JAX become Python's, NaN and infinities null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool | int):
        return float(value) if math.isfinite(value) else None
    return value
