"""Neuronpedia's NLA inference API, served by a lens.

Source: github.com/hijohnnylin/neuronpedia, ``apps/nla`` at commit 17bc391 (``README.md``,
``openapi.json`` 0.1.0, ``server.py``; ``tests/test_frame_contract.py`` pins the keys of the
frames), read on 2026-11-25. The endpoints under ``/nla``:

    GET  /nla/          models and limits
    POST /nla/tokenize  {text | messages} → {tokens, prompt_length, text}
    POST /nla/extract   {text | messages} → {layer_index, tokens: [… activation, l2_norm]}
    POST /nla/explain   {text | messages, positions, temperature, reverse, stream} →
                        {layer_index, results: [… description, mse, cosine_similarity]}
    POST /nla/describe  {activations, temperature, stream} → {results: [description, mse, …]}
    POST /nla/score     {description, activation} → {mse, cosine_similarity}

A stream consists of server-sent events: ``{layer_index, total, prompt_length}`` (explain only),
``{position | index, text, done: false}`` for each token of a text, then its result; ``[DONE]`` at
the end. ``mse`` is that of vectors scaled to norm √d: 2(1 − cos).

Every description has additional fields. ``description_tokens`` are the ids that were written and
scored, and ``reads_back`` is whether the description alone, tokenised again, gives them. A text may
read back as other tokens, so send ``description_tokens`` to ``/nla/score`` to score the same ones;
without them, its answer has the ids that it read. ``warnings`` are sentences: why the description
should not be believed (:mod:`conlens_jax.evaluation.row_warnings`); of an activation that is sent
only the norm is known. ``words`` (null at a temperature) are those of a greedy description,
``{text, support, probability}`` each: the calibrated probability that its claim is right (null: it
is none, or the lens has no calibration), and the decoder's probability of it.

A lens is no NLA pair, so some things differ. A text has the lens's own length, so a smaller
``max_new_tokens`` is refused. Up to 32 texts are written in parallel, so the frames of several
positions alternate; without ``stream``, the results are those of the stream to the last digit, with
the same samples. Tokens are not grouped into glyphs (``fragment_count`` is 1) and have no chat
roles (null). ``continue_final_message``, ``enable_thinking``, ``/compare`` and ``/completion`` are
not supported. A stream that fails ends with an ``{error}`` frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from conlens_jax.evaluation.row_warnings import norm_warnings
from conlens_jax.evaluation.words import Word
from conlens_jax.explorer.nla_requests import (
    BYTES_PER_NUMBER,
    MAX_ACTIVATIONS,
    MAX_CHARACTERS,
    MAX_DESCRIPTION,
    MAX_POSITIONS,
    DescribeRequest,
    ExplainRequest,
    SamplingOptions,
    ScoreRequest,
    TextRequest,
    most_bytes,
)
from conlens_jax.explorer.server_limits import RETRY
from conlens_jax.explorer.streams import ClosedStream, event_stream, json_stream
from conlens_jax.explorer.strict_json import StrictRoute, plain_problems
from conlens_jax.explorer.turns import Busy, Turns
from conlens_jax.inspection.lens import Lens
from conlens_jax.inspection.texts import chat_tokens, token_lists
from conlens_jax.measurement.metrics import cosine, mse_nrm
from conlens_jax.models.written import Written, with_its_tokens

_AT_ONCE = 32
"""Explanations that are written in parallel."""


def make_nla_app(lens: Lens, turns: Turns, max_tokens: int) -> FastAPI:
    """The API as a mountable application.

    Args:
      turns: shared with the other users of the lens.
      max_tokens: longer texts are refused.
    """
    app = FastAPI(title="NLA API of a consistency lens", docs_url=None, redoc_url=None)
    app.router.route_class = StrictRoute
    width, layer = lens.spec.model.d_model, lens.spec.layer
    most_activations = min(MAX_ACTIVATIONS, most_bytes(lens) // (BYTES_PER_NUMBER * width))

    @app.exception_handler(ValueError)
    async def refuse(_: Request, error: ValueError):
        return JSONResponse({"detail": str(error)}, status_code=400)

    @app.exception_handler(Busy)
    async def wait(_: Request, error: Busy):
        return JSONResponse({"detail": str(error)}, status_code=429, headers=RETRY)

    @app.exception_handler(RequestValidationError)
    async def name_fields(_: Request, error: RequestValidationError):
        return JSONResponse({"detail": plain_problems(error)}, status_code=422)

    @app.exception_handler(Exception)  # also logged
    async def admit(_: Request, error: Exception):
        message = f"the server failed ({type(error).__name__}); its log has the trace"
        return JSONResponse({"detail": message}, status_code=500)

    def tokens_of(request: TextRequest) -> list[int]:
        if request.continue_final_message or request.enable_thinking is not None:
            raise ValueError("continue_final_message and enable_thinking are not supported here")
        if request.messages:
            messages = [message.model_dump() for message in request.messages]
            answer = request.add_generation_prompt
            tokens = chat_tokens(messages, lens.model, lens.add_bos, answer=answer)
        elif request.text is None:
            raise ValueError("give text or messages")
        else:
            (tokens,) = token_lists([request.text], lens.model, lens.add_bos)
        if len(tokens) > max_tokens:
            raise ValueError(f"the text has {len(tokens)} tokens; at most {max_tokens} are read")
        return tokens

    def decoding_of(request: SamplingOptions) -> dict[str, Any]:
        if request.max_new_tokens < lens.spec.text_len:
            raise ValueError(
                f"max_new_tokens={request.max_new_tokens}: this lens writes {lens.spec.text_len}"
            )
        if request.temperature == 0:
            return {"decoding": "greedy"}
        return {"decoding": "sample", "temperature": request.temperature}

    def vector_of(activation: Sequence[float]) -> np.ndarray:
        with np.errstate(over="ignore"):
            vector = np.array(activation, np.float32)
        if len(vector) != width:
            raise ValueError(f"activation length {len(vector)} != d_model {width}")
        if not np.isfinite(vector).all() or not vector.any():
            raise ValueError("the activation is zero, or not finite")
        return vector

    def scored(description: Written, vector: np.ndarray) -> dict[str, Any]:
        """Scores one text at a time, so that its numbers do not depend on other texts."""
        with turns.turn():
            reconstruction = lens.encode(description.tokens)
        cos = float(cosine(reconstruction[None], vector[None])[0])
        return {
            "mse": float(mse_nrm(cos)),
            "cosine_similarity": cos,
            "description_tokens": list(description.tokens),
            "reads_back": description.reads_back,
        }

    def next_pieces(pieces: Iterator[list[Written]]) -> list[Written] | None:
        with turns.turn():  # one per token, so that other requests get theirs
            return next(pieces, None)

    def written(
        vectors: Sequence[np.ndarray],
        keys: Sequence[int],
        decoding: dict[str, Any],
        key: str,
        source: Sequence[int] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The frames of the texts of activations [D]: each text as it grows, then its result.

        Args:
          keys: identify the texts, also for their samples; ``key`` is their name in the frames.
          source: the tokens whose positions are ``keys``.
        """
        for start in range(0, len(vectors), _AT_ONCE):
            batch = slice(start, start + _AT_ONCE)
            pieces = lens.write_vectors(np.stack(vectors[batch]), positions=keys[batch], **decoding)
            texts: list[Written] = []
            while longer := next_pieces(pieces):
                texts = longer
                for value, text in zip(keys[batch], texts, strict=True):
                    yield {key: value, "text": text, "done": False}
            warnings = [norm_warnings(lens.trained_on, _norm(vector)) for vector in vectors[batch]]
            if source is not None:
                with turns.turn():
                    rows = lens.swaps(source, list(zip(keys[batch], texts, strict=True)))
                warnings = [row.warnings_of(row.best) for row in rows]
            words: list[Any] = [None] * len(texts)
            if decoding["decoding"] == "greedy":
                with turns.turn():
                    found = lens.words(np.stack(vectors[batch]), texts)
                words = [list(map(_word, of_text)) for of_text in found]
            for vector, text, *own in zip(vectors[batch], texts, warnings, words, strict=True):
                added = dict(zip(("warnings", "words"), own, strict=True))
                yield {"description": text, **scored(text, vector), **added}

    @app.get("/")
    def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "verbalizer_model": str(lens.facts.get("model", lens.model.model_id)),
            "reconstructor_available": True,
            "source_model": lens.model.model_id,
            "d_model": width,
            "extraction_layer": layer,
            "completion_available": False,
            "num_cuda_devices": sum(device.platform == "gpu" for device in jax.devices()),
            **dict.fromkeys(("max_concurrent", "source_max_concurrent"), 1),
            "reconstructor_max_concurrent": 1,
            **dict.fromkeys(("max_concurrent_explains", "max_describe_requests"), turns.most),
            "limits": {
                "max_input_chars": MAX_CHARACTERS,
                "max_positions_per_request": MAX_POSITIONS,
                "max_new_tokens": 4096,
                "max_describe_batch": most_activations,
                "max_description_chars": MAX_DESCRIPTION,
                "max_completion_tokens": 0,
            },
        }

    @app.post("/tokenize")
    def tokenize(request: TextRequest) -> dict[str, Any]:
        tokens = tokens_of(request)
        entries = [_token(lens, tokens, position) for position in range(len(tokens))]
        text = lens.model.tokenizer.decode(tokens)
        return {"tokens": entries, "prompt_length": len(tokens), "text": text}

    @app.post("/extract")
    def extract(request: TextRequest) -> ClosedStream:
        tokens = tokens_of(request)
        with turns.turn():
            vectors = lens.capture(tokens, "all")
        names = ("token", "token_id", "position")

        def entries() -> Iterator[dict[str, Any]]:
            for position, vector in enumerate(vectors):
                fields = _token(lens, tokens, position)
                token = {name: fields[name] for name in names}
                yield {**token, "activation": vector.tolist(), "l2_norm": _norm(vector)}

        return json_stream({"layer_index": layer}, "tokens", entries())

    @app.post("/explain")
    def explain(request: ExplainRequest):
        tokens, decoding = tokens_of(request), decoding_of(request)
        chosen = [_index(p, len(tokens)) for p in request.positions or range(len(tokens))]
        if len(chosen) > MAX_POSITIONS:
            raise ValueError(
                f"resolved {len(chosen)} positions, but max is {MAX_POSITIONS} per request; give "
                "positions"
            )
        if request.reverse:
            chosen.reverse()
        with turns.turn():
            vectors = lens.capture(tokens, chosen)

        def frames() -> Iterator[dict[str, Any]]:
            yield {"layer_index": layer, "total": len(chosen), "prompt_length": len(tokens)}
            explained = zip(chosen, vectors, strict=True)
            for frame in written(vectors, chosen, decoding, "position", tokens):
                if "description" in frame:
                    position, vector = next(explained)
                    token = _token(lens, tokens, position)
                    frame = {**token, "l2_norm": _norm(vector), **frame, "generated": False}
                yield frame

        if request.stream:
            return event_stream(frames())
        return {"layer_index": layer, "results": _results(frames())}

    @app.post("/describe")
    def describe(request: DescribeRequest):
        decoding = decoding_of(request)
        turns.reserve()
        vectors = [vector_of(activation) for activation in request.activations]

        frames = written(vectors, range(len(vectors)), decoding, "index")
        return event_stream(frames) if request.stream else {"results": _results(frames)}

    @app.post("/score")
    def score(request: ScoreRequest) -> dict[str, Any]:
        description, tokens = request.description, request.description_tokens
        if tokens is not None:
            description = with_its_tokens(description, tokens, lens.model.tokenizer, lens.spec.end)
        elif not description.strip():
            raise ValueError("the description is empty")
        return scored(lens.as_read(description), vector_of(request.activation))

    return app


def _token(lens: Lens, tokens: Sequence[int], position: int) -> dict[str, Any]:
    """The API's fields for a token."""
    return {
        "token": lens.model.tokenizer.token(tokens[position]),
        "token_id": int(tokens[position]),
        "position": position,
        "fragment_index": 0,
        "fragment_count": 1,
        **dict.fromkeys(("role", "section", "channel", "message_index")),
    }


def _word(word: Word) -> dict[str, Any]:
    # Rounded, so that it does not depend on the texts that are written beside it.
    digits = lambda value: None if value is None else round(value, 4)
    return {
        "text": word.text,
        "support": digits(word.support),
        "probability": digits(word.probability),
    }


def _index(position: int, length: int) -> int:
    if not -length <= position < length:
        raise ValueError(f"Position {position} out of range (0..{length - 1})")
    return position % length


def _results(frames: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [frame for frame in frames if "description" in frame]


def _norm(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector))
