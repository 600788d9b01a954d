"""What an explanation is: a text for an activation, what it is worth, and the token it is of."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from conlens_jax.models.written import Written


class Prediction(NamedTuple):
    """One entry of M's next-token distribution."""

    token: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """One text that stands for an activation, and what it is worth.

    Attributes:
      text: the explanation; empty where a bare vector was swapped in, or where all of its tokens
        are special ones.
      cos: cosine of the activation and of what the encoder makes of the explanation.
      kl: KL(M ‖ M with the reconstruction swapped in) of the prediction behind the token, nats.
      after: M's most probable next tokens with the swap.
      tokens: the token ids that the numbers are of. None where the text was read by another
        tokenizer than the model's, as an NLA pair reads it, where a bare vector was swapped in,
        and in JSON of earlier versions.
      reads_back: whether the text alone, tokenised again, gives these tokens; None without them.
        Where it does not, hand on the reading itself (``lens.swap(text, position, reading)``)
        and not a copy of its text.
    """

    text: str
    cos: float
    kl: float
    after: tuple[Prediction, ...]
    tokens: tuple[int, ...] | None = None
    reads_back: bool | None = None

    @classmethod
    def of(cls, text: str, cos: float, kl: float, after: tuple[Prediction, ...]) -> Reading:
        """With the tokens that ``text`` brings along, where it does."""
        if isinstance(text, Written):
            return cls(text, cos, kl, after, text.tokens, text.reads_back)
        return cls(text, cos, kl, after)


@dataclasses.dataclass(frozen=True)
class ExplainedToken:
    """What the lens says about one token of a document.

    Attributes:
      document: which of the given texts.
      position: index of the token in it; a bos token counts.
      token: the token, printable.
      before: M's most probable next tokens as it is.
      readings: the explanations, one a sample.
    """

    document: int
    position: int
    token: str
    before: tuple[Prediction, ...]
    readings: tuple[Reading, ...]

    @property
    def best(self) -> Reading:
        """The reading that changes M's prediction least."""
        return min(self.readings, key=lambda reading: reading.kl)

    @property
    def explanation(self) -> str:
        return self.best.text
