"""Standard JSON in requests, and messages about invalid requests in answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class StrictRequest(Request):
    """Refuses NaN and Infinity, which Python's parser accepts, and JSON that it cannot parse."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            values = json.loads(body.decode("utf-8-sig"), parse_constant=_no_number)
            if _SURROGATE.search(body):  # mostly whole pairs, which make a character
                json.dumps(values, ensure_ascii=False).encode()
            return values
        except json.JSONDecodeError:
            raise  # FastAPI reports the position
        except RecursionError:
            raise HTTPException(400, "the JSON is nested too deeply") from None
        except UnicodeEncodeError:
            raise HTTPException(
                400,
                "a text has half of a surrogate pair (\\ud800 to \\udfff), which is no character",
            ) from None
        except ValueError as error:  # no UTF-8, no number, or one of too many digits
            raise HTTPException(400, f"the body is no JSON: {error}") from None


class StrictRoute(APIRoute):
    """Route whose endpoint gets a :class:`StrictRequest`."""

    def get_route_handler(self) -> Callable:
        handler = super().get_route_handler()

        async def strictly(request: Request) -> Any:
            return await handler(StrictRequest(request.scope, request.receive))

        return strictly


def plain_problems(error: RequestValidationError) -> list[dict[str, Any]]:
    """The problems without the values that were sent: those can be long, or not valid JSON."""
    return [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
