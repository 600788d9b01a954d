"""What the page asks: whole texts, and experiments with one token.

    POST /api/text          {text | messages, decoding, seed, lens} → JSON lines: the tokens, then
                            explained tokens as batches are done, and what is going on in between
    POST /api/export        the same and format (html, json, csv) → the file
    POST /api/layers        {text, position, decoding, seed} → {"rows": one per lens}
    POST /api/claims        {text, position, samples, seed, lens} → what the samples agree on
    POST /api/compare       {text, positions: [a, b], lens} → how two tokens differ
    POST /api/alternatives  {text, position, tokens, count, lens} → of each token of an explanation
                            what else the decoder could have written
    POST /api/edit          {text, position, written, tokens | explanation, seed, lens} → the edited
                            explanation swapped in, and a change of the same size as a control
    POST /api/steer         the same, strength and new_tokens → the activation moved by the edit,
                            with M's continuation from there

Any of them takes ``messages`` (a chat) instead of ``text``. ``lens`` is the number of one of the
server's lenses. Requests take turns; a whole text gives way after every batch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Response

from conlens_jax.explorer.page_requests import (
    AlternativesBody,
    ClaimsBody,
    CompareBody,
    EditBody,
    ExportBody,
    LayersBody,
    PlaceBody,
    SteerBody,
    WholeBody,
)
from conlens_jax.explorer.shown import plain_row, shown_row
from conlens_jax.explorer.streams import ClosedStream
from conlens_jax.explorer.strict_json import StrictRoute
from conlens_jax.explorer.text_runs import BATCH, TextRuns
from conlens_jax.explorer.turns import Turns
from conlens_jax.inspection.changes import random_direction
from conlens_jax.inspection.explanations import Explanations
from conlens_jax.inspection.lens import Lens
from conlens_jax.inspection.texts import token_index, token_lists

KINDS = {"html": "text/html", "json": "application/json", "csv": "text/csv"}


def page_routes(
    lenses: Sequence[Lens], turns: Turns, runs: TextRuns, check: Callable[[Lens, Any], Any]
) -> APIRouter:
    """The routes.

    Args:
      turns: shared with the other users of the lenses.
      check: refuses a document that is too long for a lens.
    """
    router = APIRouter(prefix="/api", route_class=StrictRoute)
    in_batches = {"batch_size": BATCH, "whole": True}  # as whole texts, which are compiled

    def lens_of(number: int) -> Lens:
        if not 0 <= number < len(lenses):
            raise ValueError(f"lens={number}: this server has lenses 0 to {len(lenses) - 1}")
        return lenses[number]

    def place_of(request: PlaceBody) -> tuple[Lens, list[int], int]:
        """The lens, the token ids of the document, and the position in it."""
        lens = lens_of(request.lens)
        check(lens, request.content)
        (tokens,) = token_lists([request.content], lens.model, lens.add_bos)
        return lens, tokens, token_index(request.position, tokens)

    @router.post("/text")
    def explain_text(request: WholeBody) -> ClosedStream:
        check(lens_of(request.lens), request.content)
        turns.reserve()
        run = runs.run_of(request.asked)
        return ClosedStream(runs.news(request.asked, run), media_type="application/x-ndjson")

    @router.post("/export")
    def export(request: ExportBody) -> Response:
        check(lens_of(request.lens), request.content)
        turns.reserve()
        explained = runs.explain_whole(request.asked, runs.run_of(request.asked))
        return Response(_file(explained, request.format), media_type=KINDS[request.format])

    @router.post("/layers")
    def layers(request: LayersBody) -> dict[str, Any]:
        options = {"decoding": request.decoding, "seed": request.seed, **in_batches}
        rows = []
        for number in range(len(lenses)):
            lens, tokens, position = place_of(request.model_copy(update={"lens": number}))
            with turns.turn():
                (row,) = lens.explain(tokens, [position], **options, progress=False)
            shown = shown_row(row, lens.calibration is not None)
            rows.append({"lens": number, "layer": lens.spec.layer, "row": shown})
        return {"rows": rows}

    @router.post("/claims")
    def claims(request: ClaimsBody) -> dict[str, Any]:
        lens, tokens, position = place_of(request)
        with turns.turn():
            found = lens.claims(
                tokens, position, request.samples, seed=request.seed, **in_batches, progress=False
            )
        return found.record()

    @router.post("/compare")
    def compare(request: CompareBody) -> dict[str, Any]:
        lens = lens_of(request.lens)
        check(lens, request.content)
        (tokens,) = token_lists([request.content], lens.model, lens.add_bos)
        a, b = ((tokens, token_index(position, tokens)) for position in request.positions)
        with turns.turn():
            found = lens.compare(a, b)
        return {
            "towards_a": str(found.towards_a),
            "towards_b": str(found.towards_b),
            "cos": found.cos,
            "cos_towards_a": found.cos_towards_a,
        }

    @router.post("/alternatives")
    def alternatives(request: AlternativesBody) -> dict[str, Any]:
        lens, tokens, position = place_of(request)
        with turns.turn():
            found = lens.alternatives(tokens, position, request.tokens, request.count)
        return {"places": [[list(choice) for choice in place] for place in found]}

    @router.post("/edit")
    def edit(request: EditBody) -> dict[str, Any]:
        lens, tokens, position = place_of(request)
        edited = lens.as_read(_edit_of(request))
        with turns.turn():
            written_D, edited_D = lens.encode([request.written, edited])
            move_D = edited_D - written_D
            control_D = written_D + random_direction(move_D, request.seed)
            places = [(position, edited), (position, control_D)]
            row, control = lens.swaps(tokens, places)
        return {
            "row": plain_row(row),
            "control": plain_row(control),
            "moved": float(np.linalg.norm(move_D)),
        }

    @router.post("/steer")
    def steer(request: SteerBody) -> dict[str, Any]:
        lens, tokens, position = place_of(request)
        with turns.turn():
            found = lens.steer(
                # M goes on from the token whose activation is moved.
                tokens[: position + 1],
                position,
                _edit_of(request),
                strength=request.strength,
                new_tokens=request.new_tokens,
                written=request.written,
                seed=request.seed,
            )
        return {
            "effect": plain_row(found.effect),
            "control": plain_row(found.control),
            "before": found.before,
            "after": found.after,
            "after_control": found.after_control,
        }

    return router


def _edit_of(request: EditBody) -> str | list[int]:
    if (request.tokens is None) == (request.explanation is None):
        raise ValueError("give either tokens or explanation")
    if request.tokens is not None:
        return request.tokens
    if not str(request.explanation).strip():
        raise ValueError("the explanation is empty")
    return str(request.explanation)


def _file(explained: Explanations, kind: str) -> str:
    if kind == "html":
        return explained.to_html()
    if kind == "json":
        return explained.to_json()
    rows, file = explained.records(), io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def _cell(value: Any) -> Any:
    """A spreadsheet takes a text that begins with one of these for a formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value
