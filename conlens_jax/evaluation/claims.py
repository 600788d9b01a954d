"""What an explanation claims: statements that can be right or wrong, each at its place in the text.

Finding claims needs only the text; whether they are right is checked against a row
(:mod:`~conlens_jax.evaluation.studies.claims`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.corpora.statements import NOTHING, TokenVariable, alike, token_variables
from conlens_jax.data.targets.whole_words import WholeWords
from conlens_jax.models.tokenizer import Tokenizer

NEXT, CONTEXT, RECENT, FACT = "next", "context", "recent", "fact"


class Claim(NamedTuple):
    """One statement of a text.

    Attributes:
      kind: :data:`NEXT`, a word that M is said to be about to say; :data:`CONTEXT`, a content word
        that the context is said to have; :data:`RECENT`, one of its last tokens; :data:`FACT`, the
        value of a variable of a generated corpus.
      says: what is claimed, the same in two texts that agree: the first token of a next word, the
        key of a context word (:class:`WholeWords`), of a last token the number of tokens from it to
        P and its id, variable and token id of a fact.
      places: indices of its tokens in the text.
    """

    kind: str
    says: Hashable
    places: tuple[int, ...]


class ClaimReader(Protocol):
    """Finds the claims of a text."""

    def of(self, tokens: Sequence[int]) -> list[Claim]:
        """The claims of a text, given without its end; a word that is said twice is two."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What :func:`claim_reader` needs, besides tokenizer and gap."""
        ...


@dataclasses.dataclass(frozen=True)
class WordClaims:
    """Claims of texts of words (``target.kind="words"``). A gap is no claim.

    Attributes:
      comma, separator, gap: their token ids; None: there is none.
      recent_tokens: whether what follows a second separator are the last tokens of the context.
    """

    tokenizer: Tokenizer
    comma: int | None
    separator: int | None
    gap: int | None
    recent_tokens: bool = False

    @functools.cached_property
    def words(self) -> WholeWords:
        return WholeWords(self.tokenizer)

    def of(self, tokens: Sequence[int]) -> list[Claim]:
        cut = self._part_end(tokens, 0)
        second_cut = self._part_end(tokens, cut + 1) if self.recent_tokens else len(tokens)
        groups: list[list[int]] = [[]]
        for place in range(cut):
            if self.comma in (None, tokens[place]):
                groups.append([])
            if tokens[place] != self.comma:
                groups[-1].append(place)
        claims = [
            Claim(NEXT, tokens[places[0]], tuple(places))
            for places in groups
            if places and tokens[places[0]] != self.gap
        ]
        rest = [place for place in range(cut + 1, second_cut) if tokens[place] != self.gap]
        for word in self.words.of([tokens[place] for place in rest]):
            end = word.last + 1
            claims.append(Claim(CONTEXT, word.key, tuple(rest[end - len(word.tokens) : end])))
        claims += [
            Claim(RECENT, (len(tokens) - 1 - place, tokens[place]), (place,))
            for place in range(second_cut + 1, len(tokens))
            if tokens[place] != self.gap
        ]
        return claims

    def _part_end(self, tokens: Sequence[int], start: int) -> int:
        """Index of the first separator from ``start`` on; without one, the length of the text."""
        found = (place for place in range(start, len(tokens)) if tokens[place] == self.separator)
        return next(found, len(tokens))

    def to_json(self) -> dict[str, Any]:
        marks = {"comma": self.comma, "separator": self.separator}
        return {**marks, "recent_tokens": True} if self.recent_tokens else marks


@dataclasses.dataclass(frozen=True)
class FactClaims:
    """Claims of texts about the documents of a generated corpus.

    Attributes:
      corpus: the corpus's kind.
      variables: by name, how a text states them.
    """

    corpus: str
    variables: Mapping[str, TokenVariable]

    def of(self, tokens: Sequence[int]) -> list[Claim]:
        text_1T = np.asarray(tokens, np.int64)[None]
        claims = [
            Claim(FACT, (name, int(value)), (place,))
            for name in alike(self.variables)
            for place, value in enumerate(self.variables[name].stated(text_1T)[0])
            if value != NOTHING
        ]
        return sorted(claims, key=lambda claim: claim.places)

    def to_json(self) -> dict[str, Any]:
        return {"corpus": self.corpus}


def claim_reader(settings: Mapping[str, Any], tokenizer: Tokenizer, gap: int | None) -> ClaimReader:
    """The reader that ``settings`` (:meth:`ClaimReader.to_json`) describe."""
    if "corpus" in settings:
        kind = settings["corpus"]
        return FactClaims(kind, token_variables(GENERATORS[kind].variables, tokenizer))
    return WordClaims(tokenizer, **{"recent_tokens": False, **settings}, gap=gap)
