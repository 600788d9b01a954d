"""The requests of the NLA API, and their limits."""

from __future__ import annotations

from pydantic import BaseModel, Field, StrictInt

from conlens_jax.inspection.lens import Lens

MAX_CHARACTERS, MAX_DESCRIPTION, MAX_POSITIONS, MAX_ACTIVATIONS = 65_536, 8_192, 512, 512
BYTES_PER_NUMBER = 26
"""The longest JSON of a number, with its separator."""
_MOST_BYTES = 8 * 2**20


def most_bytes(lens: Lens) -> int:
    """The limit on the body of a request with activations, in bytes."""
    whole = MAX_ACTIVATIONS * lens.spec.model.d_model * BYTES_PER_NUMBER
    return max(min(whole, _MOST_BYTES), 2**20)


class Message(BaseModel):
    role: str
    content: str = ""


class TextRequest(BaseModel):
    text: str | None = Field(None, max_length=MAX_CHARACTERS)
    messages: list[Message] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    enable_thinking: bool | None = None


class SamplingOptions(BaseModel):
    temperature: float = Field(0.7, ge=0, le=5)
    max_new_tokens: int = Field(200, gt=0, le=4096)
    stream: bool = False


class ExplainRequest(TextRequest, SamplingOptions):
    # Strict: a boolean mask would be read as positions 0 and 1. An empty list is like none.
    positions: list[StrictInt] | None = Field(None, max_length=MAX_POSITIONS)
    reverse: bool = True


class DescribeRequest(SamplingOptions):
    activations: list[list[float]] = Field(min_length=1, max_length=MAX_ACTIVATIONS)


class ScoreRequest(BaseModel):
    description: str = Field(max_length=MAX_DESCRIPTION)
    description_tokens: list[int] | None = Field(None, max_length=MAX_DESCRIPTION)
    activation: list[float]
