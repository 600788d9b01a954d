"""The requests of the page, and the limits on them."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, Field, StrictInt

from conlens_jax.explorer.text_runs import Asked

MAX_CHARACTERS = 100_000
MAX_SAMPLES, MAX_NEW_TOKENS, MAX_ALTERNATIVES = 64, 64, 32
MAX_STRENGTH = 100.0


class TooLarge(ValueError):
    """More than the server reads."""


class TextBody(BaseModel):
    text: str


class Message(BaseModel):
    role: str = Field(min_length=1, max_length=64)
    content: str


class DocumentBody(BaseModel):
    """A text or chat messages, and the number of the lens."""

    text: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=1000)
    lens: StrictInt = 0

    @property
    def content(self) -> Any:
        """As the lens takes it.

        Raises:
          ValueError: neither a text nor messages, or both.
        """
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either text or messages")
        if self.messages is None:
            return self.text
        return [message.model_dump() for message in self.messages]


class PlaceBody(DocumentBody):
    position: StrictInt  # not true, and not "3"


class ExplainBody(TextBody):
    position: StrictInt
    decoding: Literal["greedy", "sample"] = "greedy"
    seed: int = 0


class SwapBody(TextBody):
    position: StrictInt
    explanation: str
    tokens: list[int] | None = Field(None, max_length=MAX_CHARACTERS)


class WholeBody(DocumentBody):
    decoding: Literal["greedy", "sample"] = "greedy"
    seed: int = 0

    @property
    def asked(self) -> Asked:
        content = self.content
        chat = not isinstance(content, str)
        text = json.dumps(content, ensure_ascii=False) if chat else content
        return Asked(text, self.decoding, self.seed, self.lens, chat)


class ExportBody(WholeBody):
    format: Literal["html", "json", "csv"]


class LayersBody(PlaceBody):
    decoding: Literal["greedy", "sample"] = "greedy"
    seed: int = 0


class ClaimsBody(PlaceBody):
    samples: StrictInt = Field(16, ge=1, le=MAX_SAMPLES)
    seed: int = 0


class CompareBody(DocumentBody):
    positions: list[StrictInt] = Field(min_length=2, max_length=2)


class AlternativesBody(PlaceBody):
    tokens: list[StrictInt] = Field(min_length=1, max_length=MAX_CHARACTERS)
    count: StrictInt = Field(8, ge=1, le=MAX_ALTERNATIVES)


class EditBody(PlaceBody):
    """``written`` and ``tokens`` are token ids, before the edit and after it; a ``text`` that was
    typed comes as ``explanation`` instead of ``tokens``."""

    written: list[StrictInt] = Field(min_length=1, max_length=MAX_CHARACTERS)
    tokens: list[StrictInt] | None = Field(None, min_length=1, max_length=MAX_CHARACTERS)
    explanation: str | None = Field(None, max_length=MAX_CHARACTERS)
    seed: int = 0


class SteerBody(EditBody):
    strength: float = Field(1.0, ge=-MAX_STRENGTH, le=MAX_STRENGTH)
    new_tokens: StrictInt = Field(24, ge=0, le=MAX_NEW_TOKENS)
