"""Which claims of the texts of a suite's rows are right."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, Protocol

import numpy as np

from conlens_jax.config import ExperimentConfig
from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.corpora.statements import alike, token_variables
from conlens_jax.evaluation.claims import Claim, ClaimReader, FactClaims
from conlens_jax.evaluation.studies.known_facts import KnownFacts
from conlens_jax.evaluation.studies.said_words import SaidWords
from conlens_jax.evaluation.suite import Evaluated, PerRow, Suite
from conlens_jax.measurement.aggregates import mean_of, ratio_of
from conlens_jax.measurement.bootstrap import Interval, Statistic
from conlens_jax.measurement.runner import SwapEffect
from conlens_jax.models.tokenizer import Tokenizer


class ClaimTruth(Protocol):
    """Checks the claims of texts against the rows of a suite."""

    @property
    def reader(self) -> ClaimReader: ...

    def is_right(self, claim: Claim, row: int, clean: SwapEffect) -> bool:
        """Whether a claim is true of a row, given M's predictions at P."""
        ...


@dataclasses.dataclass(frozen=True)
class FactTruth:
    """A value is right if the row's document has it, for any of the variables that a text cannot
    tell apart."""

    reader: FactClaims
    facts: KnownFacts

    @functools.cached_property
    def _alike(self) -> dict[str, list[int]]:
        return alike(self.facts.variables)

    def is_right(self, claim: Claim, row: int, clean: SwapEffect) -> bool:
        """See :meth:`ClaimTruth.is_right`."""
        variable, value = claim.says
        return value in self.facts.truth_NA[row, self._alike[variable]]


def claim_truth(config: ExperimentConfig, suite: Suite, tokenizer: Tokenizer) -> ClaimTruth | None:
    """For targets of words, words; for other texts about a generated corpus, its facts. None if
    nothing can be checked."""
    if config.target.kind == "words":
        return SaidWords.of_target(suite, tokenizer, config.target)
    generator = GENERATORS.get(config.corpus.kind)
    if generator is None or not token_variables(generator.variables, tokenizer):
        return None
    facts = KnownFacts.of(suite.rows, tokenizer, generator, config.corpus.seed)
    return FactTruth(FactClaims(config.corpus.kind, facts.variables), facts)


class Checked(NamedTuple):
    """A claim of the text of a row, and whether it is right."""

    claim: Claim
    row: int
    is_right: bool


def checked_claims(
    suite: Suite, truth: ClaimTruth, clean: SwapEffect, texts_NT: np.ndarray
) -> list[Checked]:
    """All claims of the texts, in the order of the rows."""
    return [
        Checked(claim, row, truth.is_right(claim, row, clean))
        for row, text in enumerate(suite.before_end(texts_NT))
        for claim in truth.reader.of(text)
    ]


def truth_of_claims(
    suite: Suite, truth: ClaimTruth, evaluated: Evaluated, greedy: list[Checked]
) -> dict[str, Interval]:
    """``claims`` per row, and ``claims_right``, the share of them that is right: of greedy texts,
    and with a prefix of sampled ones, of the greedy text of another row, and of the one that is
    written without the vector.

    Args:
      greedy: the claims of the greedy texts.
    """
    texts = evaluated.explained.texts
    checked_in = lambda texts_NT: checked_claims(suite, truth, evaluated.effects["clean"], texts_NT)
    per_row: PerRow = {}
    statistics: dict[str, Statistic] = {}
    for prefix, checked in {
        "": greedy,
        "sampled_": checked_in(texts["sampled"]),
        "null_shuffle_": checked_in(texts["greedy"][suite.partner_N]),
        "null_novec_": checked_in(evaluated.without_vector.texts["greedy"]),
    }.items():
        rows = [c.row for c in checked]
        right = [float(c.is_right) for c in checked]
        said, true = prefix + "claims", prefix + "claims_right"
        per_row[said] = np.bincount(rows, minlength=len(suite.rows)).astype(np.float64)
        per_row[true] = np.bincount(rows, right, minlength=len(suite.rows))
        statistics |= {said: mean_of(said), true: ratio_of(true, said)}
    return suite.intervals(statistics, per_row)
