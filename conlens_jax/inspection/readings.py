"""An explained token: the texts for its activation, with their scores and M's predictions."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from conlens_jax.evaluation.words import Word, words_of
from conlens_jax.models.written import Written


class Prediction(NamedTuple):
    """One entry of M's next-token distribution."""

    token: str
    probability: float


class Alternative(NamedTuple):
    """A token that the decoder could have written at a place: its id, its text with its white
    space, and its probability given the tokens before."""

    token: int
    text: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """One text of an activation, scored by swapping its reconstruction into M.

    Attributes:
      text: the explanation; empty if a bare vector was swapped in, or if all of its tokens are
        special ones.
      cos: cosine of the activation and its reconstruction by the encoder.
      kl: KL(M ‖ M with the reconstruction swapped in) of the next-token prediction, nats.
      after: M's most probable next tokens with the swap.
      tokens: the token ids that the encoder read. None if another tokenizer than the model's read
        the text, as in an NLA pair, if a bare vector was swapped in, and in JSON of earlier
        versions.
      reads_back: whether the text alone, tokenised again, gives these tokens; None without them.
        If it does not, pass the reading itself (``lens.swap(text, position, reading)``), not a
        copy of its text.
      pieces: the text of each token before its end; None for texts that are not greedy.
      support: of each of these the calibrated probability that the claim it belongs to is right;
        None where it belongs to none. None for texts that are not greedy, and without a
        calibration.
      probabilities: of each of these the decoder's probability, given those before it; None as for
        ``pieces``.
      warnings: why this text should not be believed; see
        :mod:`conlens_jax.evaluation.row_warnings`.
    """

    text: str
    cos: float
    kl: float
    after: tuple[Prediction, ...]
    tokens: tuple[int, ...] | None = None
    reads_back: bool | None = None
    pieces: tuple[str, ...] | None = None
    support: tuple[float | None, ...] | None = None
    warnings: tuple[str, ...] = ()
    probabilities: tuple[float, ...] | None = None

    @property
    def words(self) -> tuple[Word, ...] | None:
        """The text by word, with what is known of each; None for texts that are not greedy."""
        if self.pieces is None:
            return None
        return words_of(self.pieces, self.support, self.probabilities)

    @classmethod
    def of(cls, text: str, cos: float, kl: float, after: tuple[Prediction, ...]) -> Reading:
        """A reading with the tokens that ``text`` carries, if any."""
        if isinstance(text, Written):
            return cls(text, cos, kl, after, text.tokens, text.reads_back)
        return cls(text, cos, kl, after)


@dataclasses.dataclass(frozen=True)
class ExplainedToken:
    """The explanations of one token of a document.

    Attributes:
      document: index of the text among those given.
      position: index of the token in it; a bos token counts.
      token: the token, printable.
      before: M's most probable next tokens without a swap.
      readings: the explanations, one per sample.
      kl_mean: KL(M ‖ M with the mean training activation swapped in), nats; None in JSON of earlier
        versions and of an NLA pair, whose training activations are not known.
      warnings: why no explanation of this token should be believed: what training never had.
      norm: of the activation; None in JSON of earlier versions and of an NLA pair.
    """

    document: int
    position: int
    token: str
    before: tuple[Prediction, ...]
    readings: tuple[Reading, ...]
    kl_mean: float | None = None
    warnings: tuple[str, ...] = ()
    norm: float | None = None

    @property
    def best(self) -> Reading:
        """The reading that changes M's prediction least."""
        return min(self.readings, key=lambda reading: reading.kl)

    def warnings_of(self, reading: Reading) -> tuple[str, ...]:
        """All reasons not to believe one of the readings."""
        return self.warnings + reading.warnings

    @property
    def explanation(self) -> str:
        return self.best.text
