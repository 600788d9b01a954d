"""Explained tokens as the page shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from conlens_jax.evaluation.words import Word, level, note_of
from conlens_jax.inspection.readings import ExplainedToken


def plain_row(row: ExplainedToken) -> dict[str, Any]:
    return dataclasses.asdict(row)


def shown_row(row: ExplainedToken, calibrated: bool) -> dict[str, Any]:
    """With the words of a greedy text; of another, null."""
    words = row.best.words
    warned = bool(row.warnings_of(row.best))
    shown = None if words is None else shown_words(words, calibrated, warned)
    return {**plain_row(row), "words": shown}


def shown_words(words: Sequence[Word], calibrated: bool, warned: bool) -> list[dict[str, Any]]:
    return [_word(word, calibrated, warned) for word in words]


def _word(word: Word, calibrated: bool, warned: bool) -> dict[str, Any]:
    value = word.value(calibrated)
    return {
        "space": word.space,
        "text": word.text,
        "support": word.support,
        "value": value,
        "level": level(value),
        "note": "" if value is None else note_of(value, calibrated, warned),
    }
