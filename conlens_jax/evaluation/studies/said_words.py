"""Whether the words of an explanation are true (``target.kind="words"``), on any text.

An explanation says what M is about to say, then words of the context, then perhaps its last
tokens. The first part is compared with M's own predictions at P, the second with the words of the
context up to P, the third with its tokens there; each also for the text of another row, and for the
target itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

import numpy as np

from conlens_jax.config import TargetConfig
from conlens_jax.data.targets.opening import mark_ids
from conlens_jax.evaluation.claims import CONTEXT, NEXT, RECENT, Claim, WordClaims
from conlens_jax.evaluation.studies.truth import range_names
from conlens_jax.evaluation.suite import Evaluated, PerRow, Suite
from conlens_jax.measurement.aggregates import mean_of, ratio_of
from conlens_jax.measurement.bootstrap import Interval, Statistic
from conlens_jax.measurement.runner import SwapEffect
from conlens_jax.models.tokenizer import Tokenizer

DISTANCES = range_names("distance", ((0, 8), (9, 16), (17, 32), (33, 1_000_000)))
"""Tokens from the last token of a word of the context to P; 0: the word ends at P."""
BY_DISTANCE = ("", "null_shuffle_")
"""Texts (prefixes of their metrics) that are also reported by distance."""


class Said(NamedTuple):
    """The content of an explanation.

    Attributes:
      next_tokens: the first token of each word that it says M is about to say.
      context: the keys of the words that it says the context has
        (:class:`~conlens_jax.data.targets.whole_words.WholeWords`).
      recent: the tokens that it says the context ends with: (number of tokens from it to P, id).
    """

    next_tokens: frozenset[int]
    context: frozenset[str]
    recent: frozenset[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class SaidWords:
    """Compares texts with M and with the contexts of a suite's rows.

    Attributes:
      reader: finds what the texts say.
    """

    suite: Suite
    reader: WordClaims

    @classmethod
    def of_target(cls, suite: Suite, tokenizer: Tokenizer, target: TargetConfig) -> SaidWords:
        """For texts like the targets."""
        marks, gap = mark_ids(target, tokenizer), suite.measurer.spec.gap
        reader = WordClaims(tokenizer, **marks, gap=gap, recent_tokens=target.recent_tokens > 0)
        return cls(suite, reader)

    @functools.cached_property
    def _seen(self) -> list[dict[str, int]]:
        """The words of each row's context up to P, with the distance from P to the nearest."""
        rows = self.suite.rows
        return [
            {
                word.key: position - word.last
                for word in self.reader.words.of(tokens[: position + 1].tolist())
            }
            for tokens, position in zip(rows.tokens_NS, rows.positions_N.tolist(), strict=True)
        ]

    @functools.cached_property
    def _ends(self) -> list[frozenset[tuple[int, int]]]:
        """The last tokens of each row's context, as many as a text could state."""
        rows, longest = self.suite.rows, self.suite.targets_NT.shape[1]
        return [
            frozenset(
                (distance, int(tokens[position - distance]))
                for distance in range(min(longest, position + 1))
            )
            for tokens, position in zip(rows.tokens_NS, rows.positions_N.tolist(), strict=True)
        ]

    def of(self, tokens: Sequence[int]) -> Said:
        """The content of one explanation, given without its end. A gap is no word."""
        claims = self.reader.of(tokens)
        said = lambda kind: frozenset(claim.says for claim in claims if claim.kind == kind)
        return Said(said(NEXT), said(CONTEXT), said(RECENT))

    def is_right(self, claim: Claim, row: int, clean: SwapEffect) -> bool:
        """See :meth:`~.claims.ClaimTruth.is_right`."""
        if claim.kind == RECENT:
            return claim.says in self._ends[row]
        likely = clean.top_tokens if claim.kind == NEXT else self._seen
        return claim.says in likely[row]

    def truth(self, evaluated: Evaluated) -> dict[str, Interval]:
        """Of the greedy texts of a lens, and with a prefix of its sampled ones, of those of other
        rows, of the text that it writes without the vector, and of the targets:

        ``next_words_said``: words that it says M is about to say, per row; ``next_words_right``:
        the share of them that begin with one of M's five likeliest tokens; ``next_words_mass``: the
        probability that M gives these. ``context_words_said``, ``context_words_right``: the same of
        the words of the context, right if the context up to P has them; ``context_words_found``:
        the share of the target's words of the context that it says. ``recent_tokens_said``,
        ``recent_tokens_right``: tokens that it says the context ends with, right if they stand
        there.

        Of greedy texts and of other rows' the last two also by distance
        (``context_words_right_distance_0_8``): of all words that it says the context has, the share
        that the context has there, its nearest occurrence counting; these shares add up to
        ``context_words_right``. A word that the context does not have is wrong at no distance, so
        that a distance has no precision of its own: compare with another row's text, which shows
        how many of such words are there by chance.
        """
        clean, greedy = evaluated.effects["clean"], evaluated.explained.texts["greedy"]
        per_row: PerRow = {}
        statistics: dict[str, Statistic] = {}
        for prefix, texts_NT in {
            "": greedy,
            "sampled_": evaluated.explained.texts["sampled"],
            "null_shuffle_": greedy[self.suite.partner_N],
            "null_novec_": evaluated.without_vector.texts["greedy"],
            "target_": self.suite.targets_NT,
        }.items():
            per_row |= self.counts(texts_NT, clean, prefix)
            statistics |= self.statistics(prefix, self.reader.recent_tokens)
            if prefix in BY_DISTANCE:
                per_row |= self._counts_by_distance(texts_NT, prefix)
                statistics |= self._statistics_by_distance(prefix)
        return self.suite.intervals(statistics, per_row)

    @staticmethod
    def statistics(prefix: str = "", recent_tokens: bool = False) -> dict[str, Statistic]:
        """The metrics of :meth:`truth` for one kind of text, as functions of :meth:`counts`."""
        of = lambda name: prefix + name
        statistics = {
            of("next_words_mass"): mean_of(of("next_mass")),
            of("context_words_found"): ratio_of(of("context_found"), of("context_wanted")),
        }
        parts = {"next_words": "next", "context_words": "context"}
        if recent_tokens:
            parts["recent_tokens"] = "recent"
        for name, part in parts.items():
            statistics[of(f"{name}_said")] = mean_of(of(f"{part}_said"))
            statistics[of(f"{name}_right")] = ratio_of(of(f"{part}_right"), of(f"{part}_said"))
        return statistics

    @staticmethod
    def _statistics_by_distance(prefix: str) -> dict[str, Statistic]:
        of = lambda name: prefix + name
        statistics = {}
        for name in DISTANCES:
            statistics |= {
                of(f"context_words_right_{name}"): ratio_of(
                    of(f"context_right_{name}"), of("context_said")
                ),
                of(f"context_words_found_{name}"): ratio_of(
                    of(f"context_found_{name}"), of(f"context_wanted_{name}")
                ),
            }
        return statistics

    def _all_said(self, texts_NT: np.ndarray) -> list[Said]:
        return [self.of(text) for text in self.suite.before_end(texts_NT)]

    @functools.cached_property
    def _targets(self) -> list[Said]:
        return self._all_said(self.suite.targets_NT)

    def counts(self, texts_NT: np.ndarray, clean: SwapEffect, prefix: str = "") -> PerRow:
        """How many words each text says, how many of them are right, and how many of the target's
        it has.

        Args:
          clean: M's predictions at P.
        """
        said, targets = self._all_said(texts_NT), self._targets
        likely = [
            dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))
            for tokens, probabilities in zip(clean.top_tokens, clean.top_probabilities, strict=True)
        ]
        counts: dict[str, list[float]] = {
            "next_said": [len(s.next_tokens) for s in said],
            "next_right": [
                len(s.next_tokens & p.keys()) for s, p in zip(said, likely, strict=True)
            ],
            "next_mass": [
                sum(p.get(token, 0.0) for token in s.next_tokens)
                for s, p in zip(said, likely, strict=True)
            ],
            "context_said": [len(s.context) for s in said],
            "context_right": [
                len(s.context & seen.keys()) for s, seen in zip(said, self._seen, strict=True)
            ],
            "context_found": [
                len(s.context & t.context) for s, t in zip(said, targets, strict=True)
            ],
            "context_wanted": [len(t.context) for t in targets],
            "recent_said": [len(s.recent) for s in said],
            "recent_right": [
                len(s.recent & ends) for s, ends in zip(said, self._ends, strict=True)
            ],
        }
        return {prefix + name: np.asarray(values, np.float64) for name, values in counts.items()}

    def _counts_by_distance(self, texts_NT: np.ndarray, prefix: str) -> PerRow:
        said = self._all_said(texts_NT)
        counts = {}
        for name, (low, high) in DISTANCES.items():
            there = [{key for key, d in seen.items() if low <= d <= high} for seen in self._seen]
            wanted = [t.context & at for t, at in zip(self._targets, there, strict=True)]
            for what, words in {"right": there, "found": wanted}.items():
                counts[f"{prefix}context_{what}_{name}"] = _sizes(
                    s.context & w for s, w in zip(said, words, strict=True)
                )
            counts[f"{prefix}context_wanted_{name}"] = _sizes(wanted)
        return counts


def _sizes(sets: Iterable[Set[str]]) -> np.ndarray:
    return np.array([len(s) for s in sets], np.float64)
