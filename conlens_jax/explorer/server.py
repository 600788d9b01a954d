"""The explorer's server: one page, and its lenses over HTTP.

FastAPI and uvicorn, because the page needs two things that ready-made demo pages (gradio) do not
have: every token of a text is a place to stop at, and explanations appear as they are written while
other requests are served. They also have far fewer dependencies.

    GET  /             the page; its styles and scripts under /static
    GET  /api/lens     model, layer, limits; all lenses; the example
    POST /api/tokens   {text} → {tokens}
    POST /api/explain  {text, position, decoding, seed} → a JSON line {"text", "tokens": so far}
                       for each token, and a last one {"row": explained token, "words"}: of a
                       greedy text its words with support, of a sampled one null
    POST /api/swap     {text, position, explanation, tokens} → {"row": explained token}; tokens: of
                       a written explanation, whose text may read back as others
    …    /api/…        whole texts and experiments, see :mod:`conlens_jax.explorer.page_api`
    …    /nla/…        Neuronpedia's NLA API, see :mod:`conlens_jax.explorer.nla_api`

Requests share only the lens and take turns using it: a stream ends its turn after every token, and
stops when its client hangs up. Refusals are {"error": message}; for requests that are too large,
too slow or from other sites see :mod:`conlens_jax.explorer.server_limits`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from conlens_jax.evaluation.words import NO_SUPPORT
from conlens_jax.explorer.nla_api import make_nla_app
from conlens_jax.explorer.nla_requests import most_bytes
from conlens_jax.explorer.page_api import page_routes
from conlens_jax.explorer.page_files import serve_files
from conlens_jax.explorer.page_requests import (
    MAX_CHARACTERS,
    ExplainBody,
    SwapBody,
    TextBody,
    TooLarge,
)
from conlens_jax.explorer.server_limits import RETRY, LimitedRequests, Limits
from conlens_jax.explorer.shown import plain_row, shown_words
from conlens_jax.explorer.streams import ClosedStream, failure
from conlens_jax.explorer.strict_json import StrictRoute, plain_problems
from conlens_jax.explorer.text_runs import TextRuns
from conlens_jax.explorer.turns import Busy, Gone, Turns
from conlens_jax.inspection.lens import Lens
from conlens_jax.inspection.readings import ExplainedToken
from conlens_jax.models.chat import chat_template
from conlens_jax.models.written import Written, with_its_tokens

_BYTES_PER_CHARACTER = 6  # JSON may write one as \uXXXX
LIMITS = Limits(body_bytes=2 * _BYTES_PER_CHARACTER * MAX_CHARACTERS)
"""For a text and its explanation, each of the greatest length."""


def make_app(
    lens: Lens,
    others: Sequence[Lens] = (),
    *,
    max_tokens: int = 2048,
    most_waiting: int = 32,
    hosts: tuple[str, ...] = ("*",),
    origins: tuple[str, ...] = (),
    limits: Limits = LIMITS,
    example: str = "",
    names: Sequence[str] = (),
) -> FastAPI:
    """The application.

    Its ``state.runs`` are the texts that are being explained, ``state.turns`` who uses a lens.

    Args:
      others: lenses of other layers of the same model.
      max_tokens: longer texts are refused.
      most_waiting: requests that may wait; the next one is refused.
      hosts: host names that requests may use. All others are refused, among them another site's
        name that points to this machine (DNS rebinding).
      origins: other sites (``https://name:port``) whose pages may send requests (CORS).
      limits: of sizes and times.
      example: the text that the page opens on.
      names: of the lenses, as :meth:`Lens.load` takes them.
    """
    app = FastAPI(title="conlens_jax explorer", docs_url=None, redoc_url=None, openapi_url=None)
    app.router.route_class = StrictRoute
    larger = {"/nla/describe": most_bytes(lens), **limits.larger}
    limits = dataclasses.replace(limits, larger=larger)
    app.add_middleware(LimitedRequests, limits=limits, hosts=hosts, origins=origins)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    turns = Turns(most_waiting)
    lenses = [lens, *others]
    app.state.turns, app.state.runs = turns, TextRuns(lenses, turns)
    serve_files(app)

    def tokens_of(text: Any, lens: Lens = lens) -> list[str]:
        characters = len(text) if isinstance(text, str) else sum(len(m["content"]) for m in text)
        if characters > MAX_CHARACTERS:
            raise TooLarge(
                f"the text has {characters} characters; at most {MAX_CHARACTERS} are read"
            )
        tokens, most = lens.tokens(text), _most_tokens(lens, max_tokens)
        if len(tokens) > most:
            raise TooLarge(f"the text has {len(tokens)} tokens; at most {most} are read here")
        return tokens

    @app.exception_handler(ValueError)
    async def refuse(_: Request, error: ValueError):
        return _refusal(413 if isinstance(error, TooLarge) else 400, str(error))

    @app.exception_handler(Busy)
    async def wait(_: Request, error: Busy):
        return _refusal(503, str(error), RETRY)

    @app.exception_handler(HTTPException)
    async def explain_http(_: Request, error: HTTPException):
        return _refusal(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)  # also logged
    async def admit(_: Request, error: Exception):
        return _refusal(500, f"the server failed ({type(error).__name__}); its log has the trace")

    @app.exception_handler(RequestValidationError)
    async def name_fields(_: Request, error: RequestValidationError):
        problems = [
            f"{'.'.join(map(str, p['loc'][1:]))}: {p['msg']}" for p in plain_problems(error)
        ]
        return _refusal(422, "; ".join(problems))

    @app.get("/api/lens")
    async def describe() -> dict[str, Any]:
        facts = [_facts(lens, _most_tokens(lens, max_tokens)) for lens in lenses]
        for described, name in zip(facts, names, strict=False):
            described["name"] = name
        return {**facts[0], "lenses": facts, "example": example}

    @app.post("/api/tokens")
    def tokenise(request: TextBody) -> dict[str, Any]:
        return {"tokens": tokens_of(request.text)}

    @app.post("/api/explain")
    def explain(request: ExplainBody) -> ClosedStream:
        tokens_of(request.text)
        with turns.turn():  # raises for a wrong request, before anything is sent
            pieces = lens.write(
                request.text, request.position, decoding=request.decoding, seed=request.seed
            )
            first = next(pieces)
        return ClosedStream(lines(request, first, pieces), media_type="application/x-ndjson")

    def next_piece(pieces: Iterator[Written]) -> Written | None:
        with turns.turn():
            return next(pieces, None)

    def lines(request: ExplainBody, written: Written, pieces: Iterator[Written]) -> Iterator[str]:
        yield _line(text=written, tokens=written.tokens)
        try:
            while (longer := next_piece(pieces)) is not None:
                written = longer
                yield _line(text=written, tokens=written.tokens)
            with turns.turn():  # scores the text that was shown, without writing it again
                row = lens.swap(request.text, request.position, written)
                words = words_of(request, row, written)
            yield _line(row=plain_row(row), words=words)
        except Gone:
            raise
        except Exception as error:  # the answer has begun, so its status cannot change
            yield _line(error=failure(error))

    def words_of(request: ExplainBody, row: ExplainedToken, written: Written) -> list | None:
        if request.decoding != "greedy":
            return None
        vector_D = lens.capture(request.text, request.position)
        (words,) = lens.words(vector_D[None], [written])
        calibrated = lens.calibration is not None
        warned = bool(row.warnings_of(row.best))
        return shown_words(words, calibrated, warned)

    @app.post("/api/swap")
    def swap(request: SwapBody) -> dict[str, Any]:
        tokens_of(request.text)
        tokens_of(request.explanation)
        explanation = request.explanation
        if request.tokens is not None:
            explanation = with_its_tokens(
                explanation, request.tokens, lens.model.tokenizer, lens.spec.end
            )
        elif not explanation.strip():
            raise ValueError("the explanation is empty")
        with turns.turn():
            row = lens.swap(request.text, request.position, explanation)
        return {"row": plain_row(row)}

    check = lambda lens, text: tokens_of(text, lens)
    app.include_router(page_routes(lenses, turns, app.state.runs, check))
    app.mount("/nla", make_nla_app(lens, turns, _most_tokens(lens, max_tokens)))
    return app


def _most_tokens(lens: Lens, max_tokens: int) -> int:
    return min(max_tokens, lens.spec.model.max_positions)


def _facts(lens: Lens, max_tokens: int) -> dict[str, Any]:
    support = {} if lens.calibration is not None else {"no_support": NO_SUPPORT}
    return {
        **lens.facts,
        "text_len": lens.spec.text_len,
        "max_tokens": max_tokens,
        "chat": chat_template(lens.model.folder)[1] is not None,
        **support,
    }


def _refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status, headers=headers)


def _line(**values: Any) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"
