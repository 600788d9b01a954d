"""The grammar of the stories: attributes, synonyms, and rules.

A rule is a name in capitals and its alternatives, one per line, all equally likely. In an
alternative a word in capitals is another rule or an attribute, any other word is literal, and ``a``
becomes ``an`` where needed. Some rules have one form for each class of an attribute, chosen by
:func:`bindings`: ``PLOT`` and ``MORAL`` depend on the event, ``TROUBLE`` and ``DELIGHT`` on the
mood, ``SKY`` on the weather, ``AT`` on the place.
"""

from __future__ import annotations

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

_RULE_TEXT = """
STORY
    PLOT

# --- owning something, and what happens to it ---
PLOT_LOSS
    OWNER EVENT_LOSS TROUBLE BACK MEAL
    OWNER EVENT_LOSS SEARCH BACK MEAL
    PAIR EVENT_FIRST_SEEN SKY SEARCH BACK MEAL
    PAIR EVENT_FIRST_SEEN TROUBLE BACK MEAL
    PAIR EVENT_FIRST_SEEN COMFORT BACK MORAL
    OWNER EVENT_LOSS COMFORT BACK CLOSE
    PAIR EVENT_FIRST_SEEN TROUBLE COMFORT BACK
    OWNER WEATHER_FIRST SOON_LOSS COMFORT BACK
    PAIR WEATHER_FIRST SOON_FIRST_SEEN SEARCH BACK MEAL
PLOT_DAMAGE
    OWNER EVENT_DAMAGE TROUBLE MEND MEAL
    OWNER EVENT_DAMAGE ASK MEND MEAL
    PAIR EVENT_FIRST_SEEN SKY ASK MEND MEAL
    PAIR EVENT_FIRST_SEEN TROUBLE MEND MEAL
    PAIR EVENT_FIRST_SEEN COMFORT MEND MORAL
    OWNER EVENT_DAMAGE COMFORT MEND CLOSE
    PAIR EVENT_FIRST_SEEN TROUBLE COMFORT MEND
    OWNER WEATHER_FIRST SOON_DAMAGE COMFORT MEND
    PAIR WEATHER_FIRST SOON_FIRST_SEEN ASK MEND MEAL
PLOT_GAIN
    PAIR EVENT_GAIN DELIGHT TEACH MEAL
    PAIR EVENT_GAIN SHARE TEACH MEAL
    PAIR EVENT_GAIN SKY DELIGHT TEACH MEAL
    PAIR EVENT_GAIN DELIGHT TEACH SHARE_FOOD
    PAIR EVENT_GAIN TEACH SHARE_FOOD MORAL
    PAIR EVENT_GAIN TEACH SHARE_FOOD CLOSE
    PAIR WEATHER_FIRST SOON_GAIN DELIGHT TEACH MEAL
    PAIR WEATHER_FIRST SOON_GAIN TEACH SHARE_FOOD
    PAIR WEATHER_FIRST SOON_GAIN SHARE TEACH MEAL

# --- who, where, with whom ---
OWNER
    WHO_HOME HAS_BOTH
    WHO PRONOUN_HAS FRIEND_HOME
    WHO FRIEND_HOME NAME_HAS
    THING_FIRST FRIEND_HOME
    FRIEND_FIRST NAME_HAS
    PLACE_FIRST HAS_BOTH
    WHO_HOME FRIEND_IS NAME_HAS
PAIR
    WHO_HOME FRIEND_IS
    WHO FRIEND_HOME
    FRIEND_FIRST
    PLACE_FIRST FRIEND_IS
    FRIEND_FIRST HABIT
HABIT
    they played together TIMES .
    NAME and FRIEND loved to GAME .
    TIMES they went out to GAME .
WHO
    once upon a time there was a MOOD ANIMAL named NAME .
    once there was a ANIMAL named NAME , who was very MOOD .
    NAME was a MOOD little ANIMAL .
    this is the tale of NAME , a MOOD ANIMAL .
    everybody knew NAME , the MOOD ANIMAL .
    long ago there lived a MOOD ANIMAL named NAME .
WHO_HOME
    once upon a time a MOOD ANIMAL named NAME lived NEAR the PLACE .
    NEAR the PLACE there lived NAME , a MOOD ANIMAL .
    NAME was a MOOD ANIMAL from the PLACE .
    a MOOD ANIMAL lived NEAR the PLACE . HIS name was NAME .
    NAME the MOOD ANIMAL had a little house NEAR the PLACE .
PLACE_FIRST
    the PLACE was the home of a MOOD ANIMAL named NAME .
    in a house NEAR the PLACE lived NAME the MOOD ANIMAL .
    AT the PLACE there was a MOOD ANIMAL named NAME .
    go past the PLACE and you may meet NAME , a MOOD ANIMAL .
FRIEND_IS
    HIS best friend was FRIEND .
    FRIEND was HIS dear friend .
    HE had a good friend named FRIEND .
    FRIEND , a good friend , lived next door .
    HE and FRIEND were friends for life .
FRIEND_HOME
    HE lived NEAR the PLACE with HIS friend FRIEND .
    HE and FRIEND often played NEAR the PLACE .
    TIMES HE met HIS friend FRIEND NEAR the PLACE .
    FRIEND , HIS friend , had a house NEAR the PLACE .
    with FRIEND , HE liked to GAME NEAR the PLACE .
FRIEND_FIRST
    FRIEND lived NEAR the PLACE . F_HIS friend was NAME , a MOOD ANIMAL .
    NEAR the PLACE lived FRIEND and a MOOD ANIMAL named NAME .
    FRIEND had a friend AT the PLACE , a MOOD ANIMAL named NAME .
    FRIEND met NAME NEAR the PLACE . NAME was a MOOD ANIMAL .
THING_FIRST
    once there was a COLOUR OBJECT . it belonged to NAME , a MOOD ANIMAL .
    this is the tale of a COLOUR OBJECT and a MOOD ANIMAL named NAME .
    whose COLOUR OBJECT was that ? it belonged to NAME , a MOOD ANIMAL .
    a COLOUR OBJECT was all that NAME the MOOD ANIMAL had .
HAS_BOTH
    HE had a COLOUR OBJECT and a friend , FRIEND .
    HE had a friend named FRIEND and a COLOUR OBJECT .
    HE and HIS friend FRIEND had a COLOUR OBJECT .
    HE showed FRIEND , HIS friend , a COLOUR OBJECT .
NAME_HAS
    NAME had a COLOUR OBJECT .
    NAME loved HIS COLOUR OBJECT .
    NAME owned a lovely COLOUR OBJECT .
    the ANIMAL had a COLOUR OBJECT from HIS RELATIVE .
    NAME took a COLOUR OBJECT everywhere .
PRONOUN_HAS
    HE had a COLOUR OBJECT .
    HE loved HIS COLOUR OBJECT .
    HE owned a lovely COLOUR OBJECT .
    HE had a COLOUR OBJECT from HIS RELATIVE .
    HIS RELATIVE had made HIM a COLOUR OBJECT .

# --- what happens ---
EVENT_LOSS
    one WEATHER TIME , NAME EVENT the OBJECT .
    then one WEATHER TIME HE EVENT the OBJECT near the PLACE .
    but on a WEATHER TIME , NAME EVENT HIS COLOUR OBJECT .
    NAME EVENT the OBJECT one WEATHER TIME .
    it was a WEATHER TIME when the ANIMAL EVENT HIS OBJECT .
EVENT_DAMAGE
    one WEATHER TIME , NAME fell and EVENT the OBJECT .
    then one WEATHER TIME HE EVENT the OBJECT by mistake .
    but on a WEATHER TIME , NAME EVENT HIS COLOUR OBJECT .
    NAME EVENT the OBJECT one WEATHER TIME .
    it was a WEATHER TIME when the ANIMAL EVENT HIS OBJECT .
EVENT_FIRST_SEEN
    one WEATHER TIME , NAME EVENT HIS COLOUR OBJECT .
    but on a WEATHER TIME , NAME EVENT a COLOUR OBJECT .
    the ANIMAL EVENT HIS COLOUR OBJECT one WEATHER TIME .
    one WEATHER TIME NAME EVENT HIS COLOUR OBJECT near the PLACE .
    it was a WEATHER TIME when NAME EVENT HIS COLOUR OBJECT .
EVENT_GAIN
    one WEATHER TIME , NAME EVENT a COLOUR OBJECT .
    then one WEATHER TIME NAME EVENT a COLOUR OBJECT near the PLACE .
    NAME EVENT a lovely COLOUR OBJECT one WEATHER TIME .
    it was a WEATHER TIME when the ANIMAL EVENT a COLOUR OBJECT .
    on a WEATHER TIME the MOOD ANIMAL EVENT a COLOUR OBJECT .
WEATHER_FIRST
    one TIME it was very WEATHER AT the PLACE .
    then came a WEATHER TIME .
    it was a WEATHER TIME .
    the next TIME was WEATHER .
SOON_LOSS
    NAME went out and EVENT the OBJECT .
    NEAR the PLACE , NAME EVENT HIS COLOUR OBJECT .
    while HE played with FRIEND , the ANIMAL EVENT it .
    HE ran too fast and EVENT the OBJECT .
SOON_DAMAGE
    NAME fell over SPOT and EVENT the OBJECT .
    NEAR the PLACE , NAME EVENT HIS COLOUR OBJECT .
    while HE played with FRIEND , the ANIMAL EVENT it .
    HE ran too fast and EVENT the OBJECT .
SOON_FIRST_SEEN
    NAME went out and EVENT HIS COLOUR OBJECT .
    on the path , NAME EVENT HIS COLOUR OBJECT .
    the ANIMAL ran too fast and EVENT HIS COLOUR OBJECT .
    alas , the ANIMAL EVENT HIS COLOUR OBJECT .
SOON_GAIN
    NAME went out and EVENT a COLOUR OBJECT .
    NEAR the PLACE , NAME EVENT a COLOUR OBJECT .
    that was when the ANIMAL EVENT a COLOUR OBJECT .
    at long last , NAME EVENT a COLOUR OBJECT .

# --- the sky ---
SKY_WET
    there was mud everywhere .
    HIS feet got all wet .
    thunder rolled over the hills .
    drops fell on HIS nose .
SKY_FREEZING
    HIS feet were so cold .
    there was ice on the path .
    the ground was hard and cold .
    the air was cold and still .
SKY_BLOWING
    leaves flew through the air .
    the trees moved to and fro .
    dust blew into HIS eyes .
    clouds raced over the hills .
SKY_FAIR
    birds sang in the trees .
    there was not a single cloud .
    bees flew from flower to flower .
    the air smelled of grass .
SKY_DIM
    it was hard to see the path .
    everything was gray .
    even the trees were hidden .
    nobody could see very far .

# --- how it feels ---
TROUBLE_TIMID
    the MOOD ANIMAL hid behind SPOT and cried .
    HE was too scared to tell anybody .
    the ANIMAL sat down alone and wept .
    oh no , whispered the MOOD ANIMAL , my poor OBJECT !
    tears ran down the face of the ANIMAL .
TROUBLE_BOLD
    but the MOOD ANIMAL did not give up .
    the ANIMAL stood up and shouted , i will not cry !
    the MOOD ANIMAL was upset but made a plan at once .
    HE stamped the ground and asked for FRIEND .
    but HE was not scared at all .
TROUBLE_WARM
    the MOOD ANIMAL was upset but smiled anyway .
    the ANIMAL said , it was my own fault .
    the MOOD ANIMAL took a deep breath .
    HE tried to sing , but HE was too upset .
    at once the ANIMAL told FRIEND the truth .
TROUBLE_SLOW
    the MOOD ANIMAL only sighed and lay down .
    the ANIMAL kicked SPOT and hurt HIS foot .
    HE did not even notice until later .
    the MOOD ANIMAL yawned and said , what bad luck .
    the ANIMAL sat on SPOT and did nothing .
DELIGHT_TIMID
    the MOOD ANIMAL smiled softly .
    HE was almost too scared to touch it .
    the ANIMAL blushed and said nothing .
    in a low voice the ANIMAL whispered , how lovely !
DELIGHT_BOLD
    the MOOD ANIMAL shouted with joy .
    the ANIMAL showed it to everyone .
    HE climbed onto SPOT and held it up high .
    look at me , shouted the MOOD ANIMAL !
DELIGHT_WARM
    the MOOD ANIMAL laughed and danced .
    HE was so happy that HE sang .
    the ANIMAL smiled from ear to ear .
    i am so happy , said the MOOD ANIMAL .
DELIGHT_SLOW
    the MOOD ANIMAL tripped over it at once .
    the ANIMAL yawned and put it behind SPOT .
    HE used it as a pillow and fell asleep .
    what is it for , asked the MOOD ANIMAL ?

# --- help ---
SEARCH
    FRIEND and the ANIMAL looked for it everywhere .
    FRIEND said , let us look for it together .
    FRIEND helped the ANIMAL , and they looked for it all TIME .
    so the ANIMAL asked FRIEND for help .
    NAME and FRIEND looked near the PLACE , but it was not there .
    they looked behind SPOT , but the OBJECT was not there .
BACK
    at last the HELPER_OLD saw the OBJECT behind SPOT .
    a HELPER had it ! it was AT the PLACE all the time .
    then a HELPER came and gave the OBJECT to the ANIMAL .
    luckily a HELPER pulled the COLOUR OBJECT from under SPOT .
    in the end the HELPER_OLD saw something COLOUR under SPOT .
    later a HELPER met FRIEND and gave F_HIM the COLOUR OBJECT .
    but the HELPER_OLD had seen the OBJECT NEAR the PLACE .
ASK
    FRIEND said , the HELPER can help us .
    FRIEND knew who could repair a OBJECT .
    so NAME asked FRIEND for help .
    FRIEND and NAME took the OBJECT to the PLACE .
    so FRIEND and the ANIMAL went to get help .
MEND
    with TOOLS the HELPER_OLD made the OBJECT whole again .
    the HELPER_OLD used TOOLS to repair the COLOUR OBJECT .
    AT the PLACE , a HELPER helped NAME to repair the OBJECT .
    a HELPER had TOOLS , and soon the OBJECT worked again .
    then a HELPER gave TOOLS to FRIEND , who made it whole .
    a HELPER from the PLACE worked on the OBJECT for hours .
COMFORT
    FRIEND brought the ANIMAL some FOOD .
    FRIEND gave the MOOD ANIMAL some FOOD and a hug .
    FRIEND came with FOOD and kind words .
    have some FOOD , said FRIEND , it will be all right .
    NAME told FRIEND how HE EVENT it , and they shared some FOOD .
SHARE
    FRIEND asked , may i try the OBJECT too ?
    NAME let FRIEND play with the OBJECT all TIME .
    FRIEND wanted to have the OBJECT , so they took turns .
    NAME and FRIEND played with the COLOUR OBJECT for hours .
    FRIEND said , your OBJECT is lovely !
SHARE_FOOD
    FRIEND gave the ANIMAL some FOOD to try the OBJECT too .
    FRIEND brought FOOD , and they played with it all TIME .
    NAME and FRIEND had a party with FOOD NEAR the PLACE .
    to celebrate , FRIEND made FOOD for NAME .
TEACH
    the HELPER_OLD showed the ANIMAL how to take care of the OBJECT .
    a HELPER said that the OBJECT was very old .
    the HELPER_OLD told them a tale about that OBJECT .
    a HELPER came by to look at the COLOUR OBJECT .
    even the HELPER_OLD from the PLACE wanted to see it .

# --- the end ---
MEAL
    then they all ate FOOD near the PLACE .
    the ANIMAL thanked the HELPER with some tasty FOOD .
    FRIEND and the ANIMAL made FOOD for everyone .
    after that , NAME and FRIEND shared some FOOD .
    back home , the MOOD ANIMAL had FOOD for dinner .
    so the WEATHER TIME ended with FOOD for all .
    the HELPER gave the ANIMAL FOOD , and they went home .
MORAL_LOSS
    NAME never EVENT HIS OBJECT again .
    now the ANIMAL is careful with the OBJECT .
    now NAME keeps the COLOUR OBJECT in a big box .
    FRIEND still asks , where is your OBJECT ?
MORAL_DAMAGE
    NAME never EVENT HIS OBJECT again .
    now the ANIMAL is careful with the OBJECT .
    now NAME keeps the COLOUR OBJECT in a big box .
    FRIEND still asks , how is your OBJECT ?
MORAL_GAIN
    NAME was happy that HE had EVENT the OBJECT .
    the ANIMAL dreamed of the COLOUR OBJECT .
    everyone heard that NAME had EVENT a OBJECT .
    it was good that the MOOD ANIMAL EVENT it .
CLOSE
    they had the best time ever AT the PLACE .
    NAME and FRIEND were happy .
    the MOOD ANIMAL slept well .
    and the PLACE was full of laughter .
    what a WEATHER TIME that was !

# --- small words ---
NEAR
    near
    by
    beside
    close to
TIMES
    every week
    every summer
    after school
    in the summer
    on weekends
    often
GAME
    run
    dance
    sing
    climb
    play
    jump
    read
    draw
    hide
    tell jokes
HELPER_OLD
    old HELPER
    tall HELPER
    busy HELPER
    wise HELPER
    young HELPER
    strong HELPER
SPOT
    a tree
    a bush
    a stone
    a log
    a fence
    a bench
    a big leaf
    a stump
    a cart
    a gate
    a barrel
    a ladder
    a wall
    a chest
    a chair
    a haystack
TOOLS
    glue
    a hammer
    a needle
    some nails
    some wire
    a lot of tape
    a piece of string
    some wax
RELATIVE
    mother
    father
    grandmother
    grandfather
    uncle
    aunt
    sister
    brother
    cousin
"""


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
    _parse(_RULE_TEXT) | {"|".join(pair): tuple((word,) for word in pair) for pair in _PAIRS}
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
