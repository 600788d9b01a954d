"""Explanations as HTML: a self-contained page, and the fragment that a notebook shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conlens_jax.evaluation.report.markup import escape, format_number, show_token, token_marks
from conlens_jax.inspection.readings import ExplainedToken, Prediction

NOTEBOOK_ROWS = 200
_STRONGEST = 2.0  # nats of KL at which a token has its full colour

_STYLE = """
.lens{font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
.lens .text{white-space:pre-wrap;line-height:2.1;margin:0 0 1rem}
.lens .text span{padding:.15em .1em;border-radius:3px;margin-right:.2em}
.lens .text span[title]{cursor:help;border-bottom:2px solid rgba(0,114,178,.6)}
.lens table{border-collapse:collapse;width:100%}
.lens th,.lens td{text-align:left;vertical-align:top;padding:.3rem .6rem;
border-top:1px solid rgba(128,128,128,.35)}
.lens td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
.lens small{opacity:.7}
"""


ExplainedTokens = Sequence[ExplainedToken]
Documents = Sequence[Sequence[str]]


def whole_page(rows: ExplainedTokens, documents: Documents, facts: Mapping[str, Any]) -> str:
    """A complete document, without scripts or external resources.

    Args:
      rows, documents, facts: as of :class:`~conlens_jax.inspection.explanations.Explanations`.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<title>Explanations</title><style>:root{color-scheme:light dark}"
        "body{max-width:70rem;margin:2rem auto;padding:0 1rem}</style></head><body>\n"
        + _body(rows, documents, facts, len(rows))
        + "\n</body></html>\n"
    )


def fragment(rows: ExplainedTokens, documents: Documents, facts: Mapping[str, Any]) -> str:
    """The first :data:`NOTEBOOK_ROWS` rows, for use inside another page."""
    return _body(rows, documents, facts, NOTEBOOK_ROWS)


def _body(rows: ExplainedTokens, documents: Documents, facts: Mapping[str, Any], most: int) -> str:
    parts = [f'<div class="lens"><style>{_STYLE}</style>']
    described = ", ".join(f"{name} {value}" for name, value in facts.items())
    if described:
        parts.append(f"<p><small>{escape(described)}</small></p>")
    count, rows = len(rows), rows[:most]
    explained = {(row.document, row.position): row for row in rows}
    for number, tokens in enumerate(documents):
        spans = (_span(token, explained.get((number, i))) for i, token in enumerate(tokens))
        parts.append(f'<p class="text">{"".join(spans)}</p>')
    parts.append(_table(rows))
    if count > most:
        parts.append(f"<p><small>{count - most} more rows: to_html()</small></p>")
    return "\n".join([*parts, "</div>"])


def _span(token: str, row: ExplainedToken | None) -> str:
    """A token; if it is explained, coloured by the KL of its explanation."""
    if row is None:
        return f"<span>{show_token(token)}</span>"
    strength = min(max(row.best.kl, 0.0) / _STRONGEST, 1.0)
    title = escape(f"{row.explanation} (KL {format_number(row.best.kl)})")
    style = f"background:rgba(213,94,0,{0.45 * strength:.2f})"
    return f'<span title="{title}" style="{style}">{show_token(token)}</span>'


def _table(rows: ExplainedTokens) -> str:
    names = ("", "token", "explanation", "cos", "KL", "M predicts", "with the swap")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "\n".join(_table_rows(row) for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _table_rows(row: ExplainedToken) -> str:
    lines = []
    for number, reading in enumerate(row.readings):
        first, (tokens, note) = number == 0, token_marks(reading.text)
        cells = [
            f'<td class="n">{row.position if first else ""}</td>',
            f"<td>{show_token(row.token) if first else ''}</td>",
            f"<td{tokens}>{escape(reading.text)}{note}</td>",
            f'<td class="n">{format_number(reading.cos)}</td>',
            f'<td class="n">{format_number(reading.kl)}</td>',
            f"<td>{_predictions(row.before) if first else ''}</td>",
            f"<td>{_predictions(reading.after)}</td>",
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join(lines)


def _predictions(predictions: Sequence[Prediction]) -> str:
    return ", ".join(
        f"{show_token(token)} <small>{probability:.2f}</small>"
        for token, probability in predictions[:3]
    )
