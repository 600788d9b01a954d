"""Console output of a run: one structured line per event, progress bars, tables and text blocks."""

from __future__ import annotations

import contextlib
import json
import numbers
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm

_EVENT_WIDTH = 10


def format_value(value: Any) -> str:
    """Floats with four significant digits, integers in full, text quoted if needed.

    Scalars of NumPy and JAX are formatted like Python's.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, numbers.Integral):
        return str(value)
    if isinstance(value, numbers.Real):
        return f"{float(value):.4g}"
    text = str(value)
    if not text or any(c.isspace() or c in '="' for c in text):
        return json.dumps(text, ensure_ascii=False)
    return text


def format_fields(fields: Mapping[str, Any]) -> str:
    """``name=value`` pairs, separated by spaces."""
    return " ".join(f"{name}={format_value(value)}" for name, value in fields.items())


def format_seconds(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """Prints to one stream; lines do not break a live progress bar.

    Args:
      stream: where to print; None is the standard error stream.
      interactive: whether progress is a live bar. None: if the stream is a terminal.
      enabled: False prints nothing; used in all processes but the first.
      seconds_between_lines: without a bar, the minimum time between lines of progress.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        *,
        enabled: bool = True,
        seconds_between_lines: float = 20.0,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._interactive = self._stream.isatty() if interactive is None else interactive
        self._enabled = enabled
        self._seconds_between_lines = seconds_between_lines

    def line(self, event: str, /, **fields: Any) -> None:
        """``14:03:22 joint      step=120 loss=1.234 …``"""
        clock = time.strftime("%H:%M:%S")
        self._print(f"{clock} {event:<{_EVENT_WIDTH}} {format_fields(fields)}".rstrip())

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A fixed-width table; columns of numbers are right-aligned."""
        cells = [[_cell(value) for value in row] for row in rows]
        columns = list(zip(header, *cells, strict=True))
        widths = [max(map(len, column)) for column in columns]
        right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]

        def render(row: Sequence[str]) -> str:
            aligned = (
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right, strict=True)
            )
            return ("  " + "  ".join(aligned)).rstrip()

        rule = ["─" * width for width in widths]
        self._print("\n".join([title, render(header), render(rule), *map(render, cells)]))

    def block(self, title: str, text: str) -> None:
        """A titled block of text, indented, such as verbose samples."""
        body = "\n".join("  " + line for line in text.splitlines())
        self._print(f"── {title} ──\n{body}")

    @contextlib.contextmanager
    def progress(self, total: int, label: str, *, initial: int = 0) -> Iterator[Progress]:
        """Shows the progress of ``total`` steps, of which ``initial`` are already done.

        At the end the bar is replaced by a line with the elapsed time.
        """
        progress = Progress(
            self,
            total,
            label,
            initial,
            bar=tqdm(
                total=total,
                desc=label,
                initial=initial,
                file=self._stream,
                leave=False,
                dynamic_ncols=True,
                disable=not (self._enabled and self._interactive),
            ),
            seconds_between_lines=self._seconds_between_lines,
        )
        try:
            yield progress
        finally:
            progress.close()

    def _print(self, text: str) -> None:
        if self._enabled:
            # tqdm.write clears a live bar, prints the line, and redraws the bar.
            tqdm.write(text, file=self._stream)
            self._stream.flush()


class Progress:
    """Created by :meth:`Console.progress`."""

    def __init__(
        self,
        console: Console,
        total: int,
        label: str,
        initial: int,
        *,
        bar: tqdm,
        seconds_between_lines: float,
    ):
        self._console, self._bar = console, bar
        self._total, self._label, self._initial = total, label, initial
        self._done = initial
        self._values: dict[str, Any] = {}
        self._started = self._printed = time.monotonic()
        self._seconds_between_lines = seconds_between_lines

    def update(self, n: int = 1, /, **values: Any) -> None:
        """Adds ``n`` finished steps; ``values`` (such as losses) replace those of the same name."""
        self._done += n
        self._values.update(values)
        if not self._bar.disable:
            if values:
                self._bar.set_postfix_str(format_fields(self._values), refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if now - self._printed >= self._seconds_between_lines and self._done < self._total:
            self._printed = now
            seconds = (now - self._started) / max(self._done - self._initial, 1)
            left = format_seconds(seconds * (self._total - self._done))
            self._console.line(self._label, done=self._fraction(), left=left, **self._values)

    def close(self) -> None:
        """Removes the bar and prints the final progress."""
        self._bar.close()
        took = format_seconds(time.monotonic() - self._started)
        self._console.line(self._label, done=self._fraction(), took=took, **self._values)

    def _fraction(self) -> str:
        return f"{self._done}/{self._total}"


def _is_number(value: Any) -> bool:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    return format_value(value)
