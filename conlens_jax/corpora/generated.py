"""Corpora written by a generator: the content of every text is known, and so is its entropy.

A generator draws the values of a text's variables and then writes the text. Every choice is
counted, so the mean of ``nats`` is an upper bound on the entropy of a document in nats (an upper
bound, because different choices can give the same text), and no model can beat the entropy on
average.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora.corpus import (
    CorpusError,
    Document,
    check_split,
    described,
    not_empty,
    nothing_in_split,
    without_copies,
)
from conlens_jax.corpora.duplicates import Tally

_T = TypeVar("_T")
_DRAWS_AT_ONCE = 96


class Chooser:
    """Uniform choices from one random stream, with the −ln probability of all of them.

    Attributes:
      nats: the sum of ``ln(number of options)`` over the choices so far.
    """

    def __init__(self, rng: np.random.Generator):
        self.nats = 0.0
        self._rng = rng
        self._draws: list[float] = []

    def pick(self, options: Sequence[_T]) -> _T:
        """One of the options, all equally likely."""
        if not self._draws:
            # One NumPy call for many numbers: a call for each choice would dominate the time.
            self._draws = self._rng.random(_DRAWS_AT_ONCE).tolist()
        self.nats += math.log(len(options))
        return options[int(self._draws.pop() * len(options))]


@dataclasses.dataclass(frozen=True)
class Variable:
    """A quantity that a generator chooses for each document, and how a text states its value.

    Attributes:
      values: its possible values, each a word.
      tag: the words right before the value that identify the variable. Empty if the value alone
        identifies it, because no other variable or plain word has the same values.
    """

    values: tuple[str, ...]
    tag: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Generator:
    """Writes the documents of a corpus.

    Attributes:
      kind: its name in ``corpus.kind``.
      document: ``document(seed, index)``, a pure function. Its ``attributes`` have the names of
        ``variables``.
      variables: by name.
      synonyms: pairs of words that are equally likely in the same place, in both directions.
      rules: everything that determines the texts, as a string to be hashed.
    """

    kind: str
    document: Callable[[int, int], Document]
    variables: Mapping[str, Variable]
    synonyms: Mapping[str, str]
    rules: str


@dataclasses.dataclass(frozen=True)
class GeneratedCorpus:
    """Documents ``0 .. corpus.n_documents − 1`` of ``corpus.seed``; see :class:`corpus.Corpus`."""

    config: CorpusConfig
    generator: Generator

    def __post_init__(self):
        if self.config.n_documents < 1:
            raise CorpusError(
                f"corpus.n_documents must be at least 1 for corpus.kind={self.name!r}"
            )
        if self.config.seed < 0:
            raise CorpusError(f"corpus.seed must not be negative, not {self.config.seed}")

    @property
    def name(self) -> str:
        return self.generator.kind

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def description(self) -> dict[str, Any]:
        """The configuration, and a hash of the generator's rules."""
        rules = hashlib.sha256(self.generator.rules.encode())
        return {**described(self.config), "grammar": rules.hexdigest()}

    def documents(
        self, split: str, start: int = 0, tally: Tally | None = None
    ) -> Iterator[Document]:
        """See :class:`corpus.Corpus`."""
        check_split(split)
        return self._documents(split, start, Tally() if tally is None else tally)

    def _documents(self, split: str, start: int, tally: Tally) -> Iterator[Document]:
        config = self.config
        everything = (
            self.generator.document(config.seed, index) for index in range(config.n_documents)
        )
        documents = without_copies(everything, config, split, start, tally)
        message = lambda: nothing_in_split(config, self.name, split, tally)
        yield from not_empty(documents, start, message)
