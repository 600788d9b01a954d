"""Explanations as HTML: a self-contained page, and the fragment that a notebook shows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from conlens_jax.evaluation.report.markup import template_environment
from conlens_jax.inspection.readings import ExplainedToken

NOTEBOOK_ROWS = 200
_STRONGEST = 2.0  # nats of KL at which a token has its full colour

ExplainedTokens = Sequence[ExplainedToken]
Documents = Sequence[Sequence[str]]


def whole_page(rows: ExplainedTokens, documents: Documents, facts: Mapping[str, Any]) -> str:
    """A complete document, without external resources. Its one script hides words below a support.

    Args:
      rows, documents, facts: as of :class:`~conlens_jax.inspection.explanations.Explanations`.
    """
    return _rendered("page.html.jinja", rows, documents, facts, len(rows))


def fragment(rows: ExplainedTokens, documents: Documents, facts: Mapping[str, Any]) -> str:
    """The first :data:`NOTEBOOK_ROWS` rows, for use inside another page."""
    return _rendered("explanations.html.jinja", rows, documents, facts, NOTEBOOK_ROWS)


def _rendered(
    template: str, rows: ExplainedTokens, documents: Documents, facts: Mapping[str, Any], most: int
) -> str:
    explained = {(row.document, row.position): row for row in rows[:most]}
    marked = [
        [(token, explained.get((number, i))) for i, token in enumerate(tokens)]
        for number, tokens in enumerate(documents)
    ]
    return (
        _environment()
        .get_template(template)
        .render(
            rows=rows[:most],
            documents=marked,
            facts=facts,
            n_more=len(rows) - most,
            kind=_kind(rows),
        )
    )


def _kind(rows: ExplainedTokens) -> str:
    """What the numbers of words are; empty if there are none."""
    known = [reading for row in rows for reading in row.readings if reading.words]
    if not known:
        return ""
    return "the decoder's own probability" if known[0].support is None else "support"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = template_environment("conlens_jax.inspection")
    environment.filters["opacity"] = lambda kl: f"{0.45 * min(max(kl, 0.0) / _STRONGEST, 1.0):.2f}"
    return environment
