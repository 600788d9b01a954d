"""Additions worked out in words: text that states each digit, each carry and their count.

    add 5 5 4 , 9 6 9 . 4 and 9 is 13 , ones 3 , tens carry 1 . 5 plus 6 is 12 , tens 2 , …
    so with 3 carries : hundreds 5 , tens 2 , ones 3 .

Two numbers of three digits are drawn uniformly. After the task only a few synonyms are random: a
model that can add predicts every digit of the result, every carry, and the number of carries. A
carry is written once, at the end of its column, and must then be remembered: the next column adds
it without mentioning it.

A column's total is written out because otherwise the embedded model does not learn the digits:
without it, after 800 steps it wrote every carry correctly (from the digit and the column) and the
digits at chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from conlens_jax.config.seeds import numpy_seed
from conlens_jax.corpora.corpus import Document
from conlens_jax.corpora.generated import Chooser, Generator, Variable

PLACES = ("ones", "tens", "hundreds", "thousands")
N_DIGITS = 3
_DIGITS = tuple("0123456789")

VARIABLES: Mapping[str, Variable] = MappingProxyType(
    {
        **{place: Variable(_DIGITS, (place,)) for place in PLACES[:N_DIGITS]},
        **{
            f"carry_{place}": Variable(("0", "1"), (place, "carry"))
            for place in PLACES[1 : N_DIGITS + 1]
        },
        "carries": Variable(_DIGITS[: N_DIGITS + 1], ("with",)),
    }
)
"""Digits of the result, the carry into each place, and the number of carries."""

_PAIRS = (("add", "sum"), ("plus", "and"), ("so", "thus"))

SYNONYMS: Mapping[str, str] = MappingProxyType(
    {word: other for pair in _PAIRS for word, other in (pair, pair[::-1])}
)


def addition(seed: int, index: int) -> Document:
    """Addition ``index`` of the corpus ``seed``; words are separated by single spaces."""
    chooser = Chooser(np.random.default_rng((numpy_seed(seed), index)))
    add, plus, so = _PAIRS
    first, second = ([chooser.pick(_DIGITS) for _ in range(N_DIGITS)] for _ in range(2))
    task = [chooser.pick(add), *first, ",", *second]
    words, known, carry = [*task, "."], {}, 0
    for column, (one, other) in enumerate(zip(first[::-1], second[::-1], strict=True)):
        total = int(one) + int(other) + carry
        carry, digit = divmod(total, 10)
        here, there = PLACES[column : column + 2]
        known |= {here: str(digit), f"carry_{there}": str(carry)}
        words += [one, chooser.pick(plus), other, "is", str(total), ",", here, str(digit), ","]
        words += [there, "carry", str(carry), "."]
    known["carries"] = str(sum(known[name] == "1" for name in known if name.startswith("carry_")))
    words += [chooser.pick(so), "with", known["carries"], "carries", ":"]
    for place in PLACES[:N_DIGITS][::-1]:
        words += [place, known[place], "," if place != PLACES[0] else "."]
    attributes = {name: known[name] for name in VARIABLES}
    return Document(index, " ".join(words), attributes, chooser.nats, given=" ".join(task))


SUMS = Generator(
    kind="sums",
    document=addition,
    variables=VARIABLES,
    synonyms=SYNONYMS,
    rules=repr((1, N_DIGITS, PLACES, VARIABLES, _PAIRS)),
)
