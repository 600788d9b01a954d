"""A document whose tokens are coloured by a value, with a text for each on hover, focus or tap.

No script: the text of a token is in the page and is shown by the style sheet, in a panel at the
bottom of the window, where it fits on a phone too.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

from conlens_jax.evaluation.report.markup import escape, format_number, show_token, token_marks

STEPS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Where the next colour begins, in nats."""


@dataclasses.dataclass(frozen=True)
class HeatToken:
    """A token of the document; ``value`` is None where nothing was measured, ``tip`` the text that
    is shown for it."""

    token: str
    value: float | None = None
    tip: str = ""


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """``unit`` is that of the values; ``spaced`` says whether the tokens are words that carry no
    spaces of their own."""

    title: str
    note: str
    unit: str
    tokens: Sequence[HeatToken]
    spaced: bool = False


def _token(token: HeatToken, unit: str) -> str:
    shown = show_token(token.token)
    if token.value is None or not math.isfinite(token.value):
        return f'<span class="cold">{shown}</span>'
    tokens, note = token_marks(token.tip)
    colour = bisect.bisect_right(STEPS, token.value)
    return (
        f'<span class="hot h{colour}" tabindex="0">{shown}<span class="tip" role="tooltip">'
        f'<b>{shown}</b> <span class="says" dir="auto"{tokens}>{escape(token.tip.strip())}</span> '
        f"<i>{format_number(token.value)} {escape(unit)}</i>{note}</span></span>"
    )


def _legend(unit: str) -> str:
    ends = ["0", *(f"{step:g}" for step in STEPS)]
    items = "".join(
        f'<li><span class="swatch h{colour}"></span>{start}+</li>'
        for colour, start in enumerate(ends)
    )
    return (
        f'<ul class="legend heat-legend" aria-label="Colours">{items}<li>{escape(unit)}</li></ul>'
    )


def render_heat_map(heat_map: HeatMap) -> str:
    """The map as HTML; every token and text is escaped."""
    between = " " if heat_map.spaced else ""
    body = between.join(_token(token, heat_map.unit) for token in heat_map.tokens)
    return (
        f"<h3>{escape(heat_map.title)}</h3>"
        f'<p class="note">{escape(heat_map.note)}</p>{_legend(heat_map.unit)}'
        f'<p class="heat" dir="auto">{body}</p>\n'
    )
