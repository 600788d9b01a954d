"""Short English stories from a seeded grammar: text with known content.

Each story is drawn from :mod:`conlens_jax.corpora.story_grammar`. Its attributes are drawn first,
uniformly; the grammar then mentions them again several sentences later, so that a language model
has to carry them over many tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from conlens_jax.config.seeds import numpy_seed
from conlens_jax.corpora import story_grammar as grammar
from conlens_jax.corpora.corpus import Document
from conlens_jax.corpora.generated import Chooser, Generator, Variable

ATTRIBUTES = grammar.ATTRIBUTES
SYNONYMS = grammar.SYNONYMS


def story(seed: int, index: int) -> Document:
    """Story ``index`` of the corpus ``seed``, a pure function of the two.

    Words and punctuation are separated by single spaces, all in lower case.
    """
    chooser = Chooser(np.random.default_rng((numpy_seed(seed), index)))
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
    """Replaces ``a`` by ``an`` before a vowel sound."""
    return [
        "an" if word == "a" and grammar.starts_with_vowel_sound(words[i + 1]) else word
        for i, word in enumerate(words)
    ]


STORIES = Generator(
    kind="stories",
    document=story,
    variables={name: Variable(values) for name, values in ATTRIBUTES.items()},
    synonyms=SYNONYMS,
    rules=repr((ATTRIBUTES, sorted(grammar.RULES.items()))),
)
