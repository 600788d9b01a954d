"""Additions: done again with whole numbers, and what a model must know to write them."""

from __future__ import annotations

import math
import re

import pytest

from conlens_jax.config import GENERATED_CORPORA
from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.corpora.sums import SYNONYMS, VARIABLES, addition

SUMS = [addition(0, index) for index in range(400)]
PINNED_TEXT = (
    "add 5 5 4 , 9 6 9 . 4 and 9 is 13 , ones 3 , tens carry 1 . 5 and 6 is 12 , tens 2 , "
    "hundreds carry 1 . 5 plus 9 is 15 , hundreds 5 , thousands carry 1 . thus with 3 carries : "
    "hundreds 5 , tens 2 , ones 3 ."
)


def test_sum_is_pinned_and_depends_on_seed_and_index_alone():
    assert SUMS[1].text == PINNED_TEXT and addition(0, 1) == SUMS[1]
    assert addition(1, 1).text != PINNED_TEXT


def test_the_arithmetic_is_right():
    for document in SUMS:
        first, second = (int(n.replace(" ", "")) for n in re.findall(r"\d \d \d", document.text))
        known, columns = document.attributes, document.text.split(" . ")[1:4]
        assert known.keys() == VARIABLES.keys()
        total = f"{first + second:04}"
        assert total[1:] == known["hundreds"] + known["tens"] + known["ones"]
        carry, carries = 0, 0
        for index, (column, place) in enumerate(
            zip(columns, ("ones", "tens", "hundreds"), strict=True)
        ):
            one, other = (n // 10**index % 10 for n in (first, second))
            numbers = [int(n) for n in re.findall(r"\d+", column)]
            digit, (carry, before) = (
                (one + other + carry) % 10,
                ((one + other + carry) // 10, carry),
            )
            assert numbers == [one, other, one + other + before, digit, carry]
            assert int(known[place]) == digit
            carries += carry
        assert carry == int(total[0]) == int(known["carry_thousands"])
        assert carries == int(known["carries"])
        assert document.text.startswith(document.given + " .")


def test_text_states_each_variable_behind_its_tag_and_nothing_else_does():
    for document in SUMS[:50]:
        for name, variable in VARIABLES.items():
            values = re.findall(rf"\b{' '.join(variable.tag)} (\d+)\b", document.text)
            assert values and set(values) == {document.attributes[name]}, (name, document.text)


def test_choices_are_the_task_and_the_synonyms():
    # Six digits, and five words that have a synonym: the first, three signs, and the last line's.
    for document in SUMS[:20]:
        assert document.nats == pytest.approx(6 * math.log(10) + 5 * math.log(2))
        assert sum(word in SYNONYMS for word in document.text.split()) == 5
    words = [word for document in SUMS for word in document.text.split()]
    for word, other in SYNONYMS.items():
        assert SYNONYMS[other] == word
        assert 0.8 < words.count(word) / words.count(other) < 1.25


def test_every_generated_corpus_has_its_generator():
    assert tuple(GENERATORS) == GENERATED_CORPORA
    for kind, generator in GENERATORS.items():
        document = generator.document(3, 5)
        assert generator.kind == kind and document.attributes.keys() == generator.variables.keys()
        for name, value in document.attributes.items():
            assert value in generator.variables[name].values
