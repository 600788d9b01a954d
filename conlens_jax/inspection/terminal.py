"""Explanations as a table for the terminal, with colours if it supports them."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Sequence

from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.readings import ExplainedToken, Prediction

# ANSI colours of explanations by KL: at least 1 nat, at least 0.25, less.
_COLOURS = ((1.0, "31"), (0.25, "33"), (0.0, "32"))
_DIM = "2"
_NOTE = "* read again, the text gives other tokens; the numbers are of those written (see --json)"


def render(explanations: Explanations, *, colour: bool, width: int | None = None) -> str:
    """One line per reading: position, token, explanation, cos, KL, M's prediction before and after.

    A ``*`` after the cosine marks a text that, read again, gives other tokens than those written;
    the last line explains it.

    Args:
      colour: green, yellow and red by KL: below 0.25 nats, below 1, above.
      width: columns of the table; None: those of the terminal.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    lines = [_line(row, number) for row in explanations for number in range(len(row.readings))]
    header = ["", "token", "explanation", "cos", "KL", "M predicts", "with the swap"]
    widths = [max(_columns(cells[i]) for cells in [header, *(c for c, _ in lines)]) for i in (0, 1)]
    marked = any(reading.reads_back is False for row in explanations for reading in row.readings)
    widths += [0, 7 if marked else 6, 6, 14, 14]
    gaps = 2 * (len(widths) - 1)
    widths[2] = max(width - sum(widths) - gaps, 16)
    paint = lambda text, code: f"\x1b[{code}m{text}\x1b[0m" if colour and code else text

    def joined(cells: Sequence[str], codes: Sequence[str]) -> str:
        fitted = (_fitted(cell, size) for cell, size in zip(cells, widths, strict=True))
        return "  ".join(map(paint, fitted, codes)).rstrip()

    plain = [""] * len(header)
    rows = [joined(header, ["1"] * len(header)) if colour else joined(header, plain)]
    for cells, kl in lines:
        code = next((code for least, code in _COLOURS if kl >= least), "32")
        rows.append(joined(cells, [_DIM, "", code, "", code, _DIM, ""]))
    return "\n".join([*rows, *([paint(_NOTE, _DIM)] if marked else [])])


def _line(row: ExplainedToken, number: int) -> tuple[list[str], float]:
    reading, first = row.readings[number], number == 0
    cells = [
        str(row.position) if first else "",
        _printable(row.token) if first else "",
        _printable(reading.text),
        f"{reading.cos:.3f}{'*' if reading.reads_back is False else ''}",
        f"{reading.kl:.3f}",
        _top(row.before) if first else "",
        _top(reading.after),
    ]
    return cells, reading.kl


def _top(predictions: Sequence[Prediction]) -> str:
    token, probability = predictions[0]
    return f"{_printable(token)} {probability:.2f}"


def _printable(text: str) -> str:
    """Without control characters, which could move the cursor or change the terminal."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)


def _columns(text: str) -> int:
    """The width of a text in columns: wide characters take two, combining ones none."""
    size = lambda c: (
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
    )
    return sum(map(size, text))


def _fitted(text: str, width: int) -> str:
    """Cut or padded to ``width`` columns."""
    if _columns(text) > width:
        while _columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - _columns(text))
