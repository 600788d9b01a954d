"""Short English stories from a seeded grammar: text whose content is known.

Each story is drawn from :mod:`conlens_jax.data.story_grammar`. What it is about (its attributes)
is drawn first, uniformly; then the grammar tells it, and comes back to the attributes several
sentences later, so that a language model has to carry them over many tokens. Every choice is
counted, so the entropy of the corpus is known: the mean of ``nats`` is an upper bound on the
entropy of a story in nats (an upper bound, because two ways through the grammar can end in the
same text), and no model can beat the entropy on average.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from conlens_jax.config import CorpusConfig
from conlens_jax.data import story_grammar as grammar
from conlens_jax.data.corpus import CorpusError, Document, check_split, is_held_out

ATTRIBUTES = grammar.ATTRIBUTES
SYNONYMS = grammar.SYNONYMS

_T = TypeVar("_T")
_DRAWS_AT_ONCE = 96


class Chooser:
    """Uniform choices from one random stream, and the −ln probability of all of them.

    Attributes:
      nats: the sum of ``ln(number of options)`` over the choices so far.
    """

    def __init__(self, rng: np.random.Generator):
        self.nats = 0.0
        self._rng = rng
        self._draws: list[float] = []

    def pick(self, options: Sequence[_T]) -> _T:
        """One of the options, each as likely as the others."""
        if not self._draws:
            # One call for many numbers: a numpy call for each choice would cost most of the time.
            self._draws = self._rng.random(_DRAWS_AT_ONCE).tolist()
        self.nats += math.log(len(options))
        return options[int(self._draws.pop() * len(options))]


def story(seed: int, index: int) -> Document:
    """Story ``index`` of the corpus ``seed``: the same text wherever and whenever it is asked for.

    Words and punctuation are separated by single spaces, all in lower case.
    """
    chooser = Chooser(np.random.default_rng((seed, index)))
    attributes = _draw_attributes(chooser)
    words: list[str] = []
    _expand(("STORY",), grammar.bindings(attributes), chooser, words)
    return Document(index, " ".join(_with_articles(words)), attributes, chooser.nats)


def _draw_attributes(chooser: Chooser) -> dict[str, str]:
    drawn: dict[str, str] = {}
    for attribute, values in ATTRIBUTES.items():
        if attribute == "friend":
            values = tuple(name for name in values if name != drawn["name"])
        drawn[attribute] = chooser.pick(values)
    return drawn


def _expand(
    symbols: Sequence[str], bindings: Mapping[str, str], chooser: Chooser, words: list[str]
) -> None:
    for symbol in symbols:
        symbol = bindings.get(symbol, symbol)
        alternatives = grammar.RULES.get(symbol)
        if alternatives is None:
            words.append(symbol)
        else:
            _expand(chooser.pick(alternatives), bindings, chooser, words)


def _with_articles(words: list[str]) -> list[str]:
    """The words with ``a`` turned into ``an`` before a vowel sound."""
    return [
        "an" if word == "a" and grammar.starts_with_vowel_sound(words[i + 1]) else word
        for i, word in enumerate(words)
    ]


@dataclasses.dataclass(frozen=True)
class StoryCorpus:
    """Stories ``0 .. corpus.n_documents − 1`` of ``corpus.seed``; see :class:`corpus.Corpus`."""

    config: CorpusConfig
    name: str = "stories"

    def __post_init__(self):
        if self.config.n_documents < 1:
            raise CorpusError("corpus.n_documents must be at least 1 for corpus.kind='stories'")
        if self.config.seed < 0:
            raise CorpusError(f"corpus.seed must not be negative, not {self.config.seed}")

    def description(self) -> dict[str, Any]:
        """The configuration, and a hash of the grammar: another grammar is another corpus."""
        rules = hashlib.sha256(repr((ATTRIBUTES, sorted(grammar.RULES.items()))).encode())
        return {**dataclasses.asdict(self.config), "grammar": rules.hexdigest()}

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """See :class:`corpus.Corpus`. Stories of the other split are not even generated."""
        check_split(split)
        return self._documents(split, start)

    def _documents(self, split: str, start: int) -> Iterator[Document]:
        config, nothing = self.config, True
        for index in range(start, config.n_documents):
            held_out = is_held_out(config.seed, index, config.validation_fraction)
            if held_out == (split == "validation"):
                nothing = False
                yield story(config.seed, index)
        if nothing and start == 0:
            raise CorpusError(
                f"none of the {config.n_documents} stories is in the {split} split: change "
                f"corpus.validation_fraction={config.validation_fraction} or raise "
                "corpus.n_documents"
            )
