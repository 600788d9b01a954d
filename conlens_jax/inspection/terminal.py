"""Explanations as a table for the terminal, with colours if it supports them."""

from __future__ import annotations

import itertools
import shutil
import textwrap
import unicodedata
from collections.abc import Callable, Sequence

from conlens_jax.evaluation.words import NO_SUPPORT, level
from conlens_jax.inspection.agreement import AgreedClaims
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.readings import ExplainedToken, Prediction, Reading

# ANSI colours of explanations by KL: at least 1 nat, at least 0.25, less.
_COLOURS = ((1.0, "31"), (0.25, "33"), (0.0, "32"))
_BOLD, _DIM, _WARN = "1", "2", "1;33"
_MARKS = {_BOLD: "+", _DIM: "?"}
_SUPPORT_NOTE = {
    True: "bold: right in at least nine of ten held-out cases; dim: in fewer than half",
    False: "+ right in at least nine of ten held-out cases, ? in fewer than half",
}
_RAW_NOTE = {
    True: "bold: the decoder's own probability is at least 0.9; dim: below 0.5",
    False: "+ the decoder's own probability is at least 0.9, ? below 0.5",
}
_NOTE = "* read again, the text gives other tokens; the numbers are of those written (see --json)"


def render(explanations: Explanations, *, colour: bool, width: int | None = None) -> str:
    """One line per reading: position, token, explanation, cos, KL, M's prediction before and after.

    A ``*`` after the cosine marks a text that, read again, gives other tokens than those written;
    the last line explains it. Words whose support is known are bold, plain or dim, or have a mark
    without colour. A ``!`` after the position marks a row that should not be believed: a line that
    begins with ``!`` gives the reason, once for consecutive rows that share it.

    Args:
      colour: green, yellow and red by KL: below 0.25 nats, below 1, above.
      width: columns of the table; None: those of the terminal.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    lines = [
        _line(row, number, marks=not colour)
        for row in explanations
        for number in range(len(row.readings))
    ]
    reasons = _reasons(explanations)
    header = ["", "token", "explanation", "cos", "KL", "M predicts", "with the swap"]
    widths = [
        max(_columns(cells[i]) for cells in [header, *(c for c, _, _ in lines)]) for i in (0, 1)
    ]
    marked = any(reading.reads_back is False for row in explanations for reading in row.readings)
    widths += [0, 7 if marked else 6, 6, 14, 14]
    gaps = 2 * (len(widths) - 1)
    widths[2] = max(width - sum(widths) - gaps, 16)
    paint = lambda text, code: f"\x1b[{code}m{text}\x1b[0m" if colour and code else text

    def joined(cells: Sequence[str], codes: Sequence[str], parts: Sequence[Part] = ()) -> str:
        fitted = [_fitted(cell, size) for cell, size in zip(cells, widths, strict=True)]
        painted = list(map(paint, fitted, codes))
        if parts and colour:
            painted[2] = _painted(fitted[2], parts, paint)
        return "  ".join(painted).rstrip()

    plain = [""] * len(header)
    rows = [joined(header, [_BOLD] * len(header)) if colour else joined(header, plain)]
    for (before, after), (cells, kl, parts) in zip(reasons, lines, strict=True):
        code = next((code for least, code in _COLOURS if kl >= least), "32")
        rows += [paint(line, _WARN) for line in _wrapped(before, width)]
        rows.append(joined(cells, [_DIM, "", code, "", code, _DIM, ""], parts))
        rows += [paint(line, _WARN) for line in _wrapped(after, width)]
    known = [reading for row in explanations for reading in row.readings if reading.words]
    notes = []
    if known:
        calibrated = known[0].support is not None
        notes = [_SUPPORT_NOTE[colour]] if calibrated else [_RAW_NOTE[colour], NO_SUPPORT]
    notes += [_NOTE] if marked else []
    return "\n".join([*rows, *(paint(note, _DIM) for note in notes)])


def _reasons(explanations: Explanations) -> list[tuple[list[str], list[str]]]:
    """Of each line the warnings before it, which hold for all rows up to the next ones, and those
    after it, of its own text."""
    found = []
    for _, group in itertools.groupby(explanations, lambda row: (row.document, row.warnings)):
        rows = list(group)
        first, last = rows[0].position, rows[-1].position
        which = f"{first}" if first == last else f"{first} to {last}"
        before = [f"{which}: {_printable(reason)}" for reason in rows[0].warnings]
        for row in rows:
            for reading in row.readings:
                found.append((before, list(map(_printable, reading.warnings))))
                before = []
    return found


def _wrapped(reasons: Sequence[str], width: int) -> list[str]:
    return [f"! {line}" for reason in reasons for line in textwrap.wrap(reason, width - 2)]


Part = tuple[str, str]
"""A part of an explanation, and the ANSI code of its support."""


def _parts(row: ExplainedToken, reading: Reading) -> list[Part]:
    """The explanation as texts with the ANSI codes of their words; empty if its words are not
    known. Words of a row that should not be believed are all dim."""
    calibrated, warned = reading.support is not None, bool(row.warnings_of(reading))
    parts = []
    for word in reading.words or ():
        value = word.value(calibrated)
        code = _DIM if warned else _code(value)
        parts += [(_printable(word.space), ""), (_printable(word.text), code)]
    return parts


def _code(value: float | None) -> str:
    return {"sure": _BOLD, "doubtful": _DIM, "": ""}[level(value)]


def _painted(fitted: str, parts: Sequence[Part], paint: Callable[[str, str], str]) -> str:
    """A cell that begins with the parts, cut or padded, with the code of each."""
    painted, start = [], 0
    for text, code in parts:
        painted.append(paint(fitted[start : start + len(text)], code))
        start += len(text)
    return "".join(painted) + fitted[start:]


def _marked(parts: Sequence[Part], warned: bool) -> str:
    """The parts with a mark after each word that is sure or doubtful; none where no word counts."""
    marks = {} if warned else _MARKS
    return "".join(text + marks.get(code, "") for text, code in parts)


def _line(row: ExplainedToken, number: int, marks: bool) -> tuple[list[str], float, list[Part]]:
    """Cells, KL, and the parts of the explanation."""
    reading, first = row.readings[number], number == 0
    warned = bool(row.warnings_of(reading))
    parts = _parts(row, reading)
    written = _marked(parts, warned) if marks else "".join(text for text, _ in parts)
    cells = [
        (str(row.position) if first else " ") + ("!" if warned else ""),
        _printable(row.token) if first else "",
        written if parts else _printable(reading.text),
        f"{reading.cos:.3f}{'*' if reading.reads_back is False else ''}",
        f"{reading.kl:.3f}",
        _top(row.before) if first else "",
        _top(reading.after),
    ]
    return cells, reading.kl, parts


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


def render_claims(found: Sequence[AgreedClaims], *, colour: bool) -> str:
    """One line per claim: its support, how many samples state it, its lift, and the positions next
    to P whose greedy texts state it too. Claims that should not be believed are dim and have no
    mark; a line that begins with ``!`` gives the reason.

    Args:
      colour: bold and dim by support; without it the marks of :func:`render`.
    """
    header = ("", "token", "claim", "support", "samples", "lift", "also at")
    table, reasons = [], [()]  # those after each line; the first is the header
    for at in found:
        for number, claim in enumerate(at):
            support, code = "", ""
            if claim.support is not None:
                code = _DIM if at.warnings else _code(claim.support)
                mark = "" if colour or at.warnings else _MARKS.get(code, "")
                support = f"{claim.support:.2f}{mark}"
            cells = (
                f"{at.position}{'!' if at.warnings else ''}" if not number else "",
                _printable(at.token) if not number else "",
                f"{claim.kind} {_printable(claim.text)}",
                support,
                f"{round(claim.share * at.samples)}/{at.samples}",
                "" if claim.lift is None else f"{claim.lift:.1f}",
                " ".join(f"P{offset:+d}" for offset in claim.neighbours),
            )
            table.append((cells, code))
            reasons.append(at.warnings if number == len(at) - 1 else ())
    lines = [(header, _BOLD), *table]
    widths = [max(_columns(cells[i]) for cells, _ in lines) for i in range(len(header))]
    joined = lambda cells: "  ".join(map(_fitted, cells, widths)).rstrip()
    paint = lambda text, code: f"\x1b[{code}m{text}\x1b[0m" if colour and code else text
    shown = []
    for (cells, code), after in zip(lines, reasons, strict=True):
        shown.append(paint(joined(cells), code))
        shown += [paint(f"! {_printable(reason)}", _WARN) for reason in after]
    notes = [_SUPPORT_NOTE[colour]] if any(code for _, code in table) else []
    return "\n".join([*shown, *(paint(note, _DIM) for note in notes)])
