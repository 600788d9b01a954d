"""JSON-lines files in the run folder."""

from __future__ import annotations

import json
import math
import numbers
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conlens_jax.files.paths import local_path
from conlens_jax.files.whole import naming_full_disk, write_whole


class MetricsFile:
    """A file like ``metrics.jsonl``: one JSON object per line, flushed after each record.

    Every record has ``step`` and ``time`` (Unix seconds). Values that are not finite are written as
    null, since JSON has no NaN.

    Args:
      path: appended to; its folder is created. A partial last line, left by a kill, is removed.
      enabled: False writes nothing; used in all processes but the first.
    """

    def __init__(self, path: str | Path, *, enabled: bool = True):
        self.path = local_path(path)
        self._enabled = enabled
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if _has_partial_line(self.path):
                self._rewrite(read_metrics(self.path))

    def write(self, step: int, **values: Any) -> None:
        """Appends one record, such as ``write(120, stage="joint", loss=1.2)``."""
        if not self._enabled:
            return
        record = {"step": step, "time": round(time.time(), 3), **values}
        with naming_full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(record))

    def truncate_after(self, step: int) -> None:
        """Drops the records of steps after ``step``, which a resumed run writes again."""
        if self._enabled and self.path.exists():
            self._rewrite([record for record in read_metrics(self.path) if record["step"] <= step])

    def _rewrite(self, records: Sequence[Mapping[str, Any]]) -> None:
        write_whole(self.path, "".join(json_line(r) for r in records))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a partial last line, left by a kill, is ignored.

    Raises:
      ValueError: any other line is not JSON.
    """
    # After the last newline there is nothing, or a partial line.
    lines = local_path(path).read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON; remove the line, or the file: {error}"
            ) from error
    return records


def _has_partial_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def json_line(record: Mapping[str, Any]) -> str:
    """A record as one line; NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON types: scalars of NumPy and JAX become Python numbers, NaN and infinities null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool | int):
        return float(value) if math.isfinite(value) else None
    return value
