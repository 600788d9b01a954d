"""The grammar of the stories: attributes, synonyms, and rules (``story_rules.txt``).

Some rules have one form for each class of an attribute, chosen by :func:`bindings`.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Mapping
from types import MappingProxyType


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_GIRLS = _words(
    "anna lily mia emma sara nora ruby clara rosa alice julia hanna olga tina vera wendy zoe ivy "
    "lucy bella"
)
_BOYS = _words(
    "tom max finn jack leo sam ben oscar hugo felix peter paul simon david adam noah theo otto "
    "ivan carl"
)
_NAMES = _GIRLS + _BOYS

_MOODS = {
    "shy nervous lonely quiet gentle": "TIMID",
    "brave proud bossy curious clever": "BOLD",
    "cheerful jolly polite generous honest": "WARM",
    "lazy sleepy clumsy silly grumpy": "SLOW",
}
_EVENTS = {
    "lost dropped misplaced forgot": "LOSS",
    "broke damaged ruined smashed": "DAMAGE",
    "found won bought borrowed": "GAIN",
}
_PLACES = {
    "forest meadow garden valley village castle park cave orchard library barn tower": "in",
    "beach market lake river pond waterfall farm fountain bridge harbor lighthouse mill": "at",
}
_WEATHERS = {
    "rainy stormy showery": "WET",
    "snowy frosty icy": "FREEZING",
    "windy breezy gusty": "BLOWING",
    "sunny warm": "FAIR",
    "foggy misty": "DIM",
}


def _class_of_word(classes: Mapping[str, str]) -> dict[str, str]:
    return {word: name for words, name in classes.items() for word in _words(words)}


_CLASS_OF_MOOD = _class_of_word(_MOODS)
_CLASS_OF_EVENT = _class_of_word(_EVENTS)
_PREPOSITION_OF_PLACE = _class_of_word(_PLACES)
_CLASS_OF_WEATHER = _class_of_word(_WEATHERS)

ATTRIBUTES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "name": _NAMES,
        "friend": _NAMES,
        "animal": _words(
            "dog cat duck fox bear mouse rabbit frog turtle owl horse cow pig goat sheep hen wolf "
            "tiger lion monkey elephant squirrel hedgehog beaver otter penguin parrot deer"
        ),
        "mood": tuple(_CLASS_OF_MOOD),
        "place": tuple(_PREPOSITION_OF_PLACE),
        "object": _words(
            "kite drum lamp bell mirror flute doll wagon whistle cup crown basket umbrella clock "
            "sled trumpet lantern necklace robot guitar compass teapot bucket violin puppet sword "
            "telescope scooter"
        ),
        "colour": _words(
            "red blue green yellow purple orange pink white black brown silver golden"
        ),
        "weather": tuple(_CLASS_OF_WEATHER),
        "time": _words("day morning afternoon evening"),
        "event": tuple(_CLASS_OF_EVENT),
        "helper": _words(
            "farmer baker doctor teacher miller fisherman king queen gardener painter sailor tailor"
        ),
        "food": _words(
            "cake soup honey bread cheese porridge pie jam rice salad pudding popcorn chocolate "
            "pasta toast yogurt"
        ),
    }
)
"""All values of each attribute, each one word. ``name`` and ``friend`` have the same list, so a
name does not identify which person is meant; all other values belong to one attribute only, and
none is an ordinary word of the rules."""

_PAIRS = (
    ("little", "small"),
    ("happy", "glad"),
    ("big", "large"),
    ("shouted", "yelled"),
    ("smiled", "grinned"),
    ("looked", "searched"),
    ("friend", "pal"),
    ("named", "called"),
    ("scared", "afraid"),
    ("path", "trail"),
    ("tasty", "delicious"),
    ("lovely", "wonderful"),
    ("upset", "unhappy"),
    ("stone", "rock"),
    ("repair", "fix"),
    ("tale", "story"),
)

SYNONYMS: Mapping[str, str] = MappingProxyType(
    {word: other for pair in _PAIRS for word, other in (pair, pair[::-1])}
)
"""Pairs of words that are equally likely in the same place, in both directions."""


def _parse(text: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    rules: dict[str, list[tuple[str, ...]]] = {}
    alternatives: list[tuple[str, ...]] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if not line.startswith(" "):
            alternatives = rules.setdefault(line.strip(), [])
        else:
            alternatives.append(tuple(_SYMBOL_OF_WORD.get(word, word) for word in line.split()))
    return {name: tuple(alternatives) for name, alternatives in rules.items()}


# Both words of a pair are replaced by a rule that writes one of the two.
_SYMBOL_OF_WORD = {word: "|".join(pair) for pair in _PAIRS for word in pair}

RULES: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    _parse(importlib.resources.files(__package__).joinpath("story_rules.txt").read_text("utf-8"))
    | {"|".join(pair): tuple((word,) for word in pair) for pair in _PAIRS}
)
"""Every rule with its alternatives, as tuples of symbols."""


def bindings(attributes: Mapping[str, str]) -> dict[str, str]:
    """The replacement of each symbol that depends on a story's attributes: a word, or the name of
    the rule for the mood, the event, or the weather."""
    event = _CLASS_OF_EVENT[attributes["event"]]
    mood = _CLASS_OF_MOOD[attributes["mood"]]
    return {
        **{attribute.upper(): value for attribute, value in attributes.items()},
        **_pronouns(attributes["name"], ""),
        **_pronouns(attributes["friend"], "F_"),
        "PLOT": f"PLOT_{event}",
        "MORAL": f"MORAL_{event}",
        "TROUBLE": f"TROUBLE_{mood}",
        "DELIGHT": f"DELIGHT_{mood}",
        "AT": _PREPOSITION_OF_PLACE[attributes["place"]],
        "SKY": f"SKY_{_CLASS_OF_WEATHER[attributes['weather']]}",
    }


def _pronouns(name: str, prefix: str) -> dict[str, str]:
    he, his, him = ("she", "her", "her") if name in _GIRLS else ("he", "his", "him")
    return {prefix + "HE": he, prefix + "HIS": his, prefix + "HIM": him}


def starts_with_vowel_sound(word: str) -> bool:
    """Whether the word takes ``an`` (for the words of this grammar)."""
    return word[0] in "aeiou" or word == "honest"


def words() -> frozenset[str]:
    """Every word and punctuation mark that a story can contain."""
    symbols: Iterable[str] = {
        symbol for rule in RULES.values() for alternative in rule for symbol in alternative
    }
    plain = {symbol for symbol in symbols if symbol == symbol.lower() and "|" not in symbol}
    values = {value for values in ATTRIBUTES.values() for value in values}
    return frozenset(
        plain | values | set(_PLACES.values()) | {"an", "he", "she", "his", "her", "him"}
    )
