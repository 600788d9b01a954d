"""Explanations as a table for the terminal, with colours if it supports them."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable, Sequence

from conlens_jax.inspection.agreement import AgreedClaims
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.readings import ExplainedToken, Prediction, Reading

# ANSI colours of explanations by KL: at least 1 nat, at least 0.25, less.
_COLOURS = ((1.0, "31"), (0.25, "33"), (0.0, "32"))
_BOLD, _DIM = "1", "2"
_MARKS = {_BOLD: "+", _DIM: "?"}
SURE, DOUBTFUL = 0.9, 0.5
"""The support from which a word is shown as sure, and below which as doubtful."""
_SUPPORT_NOTE = {
    True: "bold: right in at least nine of ten held-out cases; dim: in fewer than half",
    False: "+ right in at least nine of ten held-out cases, ? in fewer than half",
}
_NOTE = "* read again, the text gives other tokens; the numbers are of those written (see --json)"


def render(explanations: Explanations, *, colour: bool, width: int | None = None) -> str:
    """One line per reading: position, token, explanation, cos, KL, M's prediction before and after.

    A ``*`` after the cosine marks a text that, read again, gives other tokens than those written;
    the last line explains it. Words whose support is known are bold, plain or dim, or have a mark
    without colour.

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
    for cells, kl, parts in lines:
        code = next((code for least, code in _COLOURS if kl >= least), "32")
        rows.append(joined(cells, [_DIM, "", code, "", code, _DIM, ""], parts))
    notes = [_SUPPORT_NOTE[colour]] if any(parts for _, _, parts in lines) else []
    notes += [_NOTE] if marked else []
    return "\n".join([*rows, *(paint(note, _DIM) for note in notes)])


Part = tuple[str, str]
"""A part of an explanation, and the ANSI code of its support."""


def _parts(reading: Reading) -> list[Part]:
    """The explanation by token; empty if the support of its words is not known."""
    if reading.pieces is None or reading.support is None:
        return []
    pieces = [_printable(piece) for piece in reading.pieces]
    if pieces:
        pieces[0] = pieces[0].lstrip()
    return [(piece, _code(s)) for piece, s in zip(pieces, reading.support, strict=True)]


def _code(support: float | None) -> str:
    if support is None or DOUBTFUL <= support < SURE:
        return ""
    return _BOLD if support >= SURE else _DIM


def _painted(fitted: str, parts: Sequence[Part], paint: Callable[[str, str], str]) -> str:
    """A cell that begins with the parts, cut or padded, with the code of each."""
    painted, start = [], 0
    for text, code in parts:
        painted.append(paint(fitted[start : start + len(text)], code))
        start += len(text)
    return "".join(painted) + fitted[start:]


def _marked(parts: Sequence[Part]) -> str:
    """The parts with a mark after each word that is sure or doubtful."""
    text = ""
    for number, (part, code) in enumerate(parts, start=1):
        following = parts[number][0] if number < len(parts) else " "
        text += part + (_MARKS.get(code, "") if following.startswith(" ") else "")
    return text


def _line(row: ExplainedToken, number: int, marks: bool) -> tuple[list[str], float, list[Part]]:
    """Cells, KL, and the parts of the explanation."""
    reading, first = row.readings[number], number == 0
    parts = _parts(reading)
    written = _marked(parts) if marks else "".join(text for text, _ in parts)
    cells = [
        str(row.position) if first else "",
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
    to P whose greedy texts state it too.

    Args:
      colour: bold and dim by support; without it the marks of :func:`render`.
    """
    header = ("", "token", "claim", "support", "samples", "lift", "also at")
    table = []
    for at in found:
        for number, claim in enumerate(at):
            support, code = "", ""
            if claim.support is not None:
                code = _code(claim.support)
                support = f"{claim.support:.2f}" + ("" if colour else _MARKS.get(code, ""))
            cells = (
                str(at.position) if not number else "",
                _printable(at.token) if not number else "",
                f"{claim.kind} {_printable(claim.text)}",
                support,
                f"{round(claim.share * at.samples)}/{at.samples}",
                "" if claim.lift is None else f"{claim.lift:.1f}",
                " ".join(f"P{offset:+d}" for offset in claim.neighbours),
            )
            table.append((cells, code))
    lines = [(header, _BOLD), *table]
    widths = [max(_columns(cells[i]) for cells, _ in lines) for i in range(len(header))]
    joined = lambda cells: "  ".join(map(_fitted, cells, widths)).rstrip()
    paint = lambda text, code: f"\x1b[{code}m{text}\x1b[0m" if colour and code else text
    notes = [_SUPPORT_NOTE[colour]] if any(code for _, code in table) else []
    return "\n".join(
        [*(paint(joined(cells), code) for cells, code in lines), *(paint(n, _DIM) for n in notes)]
    )
