"""The files of the page, each served under a fixed name with its own content type.

Plain style sheets and JavaScript modules, which the browser runs as they are. The type, the colours
and the words with their support are the report's own files.
"""

from __future__ import annotations

import importlib.resources

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from conlens_jax.evaluation.report.markup import BASE_CSS, WORDS_CSS, WORDS_JS

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_STATIC = importlib.resources.files(__package__).joinpath("static")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Only this server's own scripts and styles, none inside the page, and requests only to it."""


def page_files() -> dict[str, str]:
    """Name → content."""
    own = {file.name: file.read_text("utf-8") for file in _STATIC.iterdir() if file.is_file()}
    shared = {
        "base.css": BASE_CSS,
        "words.css": WORDS_CSS,
        "words.js": f"{WORDS_JS}\nexport {{ hideBelow }};\n",
    }
    return {**own, **shared}


def serve_files(app: FastAPI) -> None:
    """Adds ``GET /``, the page, and ``GET /static/<name>``."""
    files = page_files()

    def answer(name: str) -> Response:
        _, dot, ending = name.rpartition(".")
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        kind = f"{_TYPES[dot + ending]}; charset=utf-8"
        return Response(files[name], headers={**headers, "Content-Type": kind})

    @app.get("/")
    async def page() -> Response:
        return answer("index.html")

    @app.get("/static/{name}")
    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, f"the page has no file {name!r:.80}")
        return answer(name)
