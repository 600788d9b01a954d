"""What is known of each row of a generated corpus: the values of its variables, where its context
states them, and whether a text does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from conlens_jax.corpora.generated import Generator
from conlens_jax.corpora.statements import (
    NOTHING,
    TokenVariable,
    alike,
    known_ids,
    token_variables,
)
from conlens_jax.data.rows import Rows
from conlens_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class KnownFacts:
    """The variables of N rows; the axis A is that of :attr:`variables`.

    Attributes:
      variables: by name, how a text states them.
      truth_NA: token id of the document's own value, :data:`NOTHING` where it is not one token.
      distance_NA: tokens from where the context last states it to P (0: at P), :data:`NOTHING`
        where it does not state it up to P.
      ahead_NA: tokens from P to where the document first states it, for what is not stated up
        to P; :data:`NOTHING` otherwise.
      known_NA: whether the context up to P decides it: it is stated, or the given part has been
        read (the task of a sum decides the sum).
    """

    variables: Mapping[str, TokenVariable]
    truth_NA: np.ndarray
    distance_NA: np.ndarray
    ahead_NA: np.ndarray
    known_NA: np.ndarray

    @property
    def mentioned_NA(self) -> np.ndarray:
        return self.distance_NA != NOTHING

    @staticmethod
    def of(rows: Rows, tokenizer: Tokenizer, generator: Generator, seed: int) -> KnownFacts:
        """Generates the rows' documents again: a document's id is its index in the corpus."""
        variables = token_variables(generator.variables, tokenizer)
        truth_NA = np.full((len(rows), len(variables)), NOTHING, np.int64)
        given_N = np.full(len(rows), rows.tokens_NS.shape[1], np.int64)
        starts_N = rows.tokens_NS[:, 0] == tokenizer.bos_id
        for number in np.unique(rows.documents_N).tolist():
            document = generator.document(seed, number)
            here = rows.documents_N == number
            if document.given:
                given_N[here] = len(tokenizer.encode(document.given)) + starts_N[here]
            for index, (name, variable) in enumerate(variables.items()):
                ids = known_ids(document.attributes[name], tokenizer)
                if len(ids) == 1 and ids[0] in variable.values_K:
                    truth_NA[here, index] = ids[0]
        places = [
            _places(variable, truth_N, rows)
            for variable, truth_N in zip(variables.values(), truth_NA.T, strict=True)
        ]
        distance_NA, ahead_NA = (np.stack(columns, axis=1) for columns in zip(*places, strict=True))
        is_given_NA = (rows.positions_N + 1 >= given_N)[:, None] & (truth_NA != NOTHING)
        known_NA = (distance_NA != NOTHING) | is_given_NA
        return KnownFacts(variables, truth_NA, distance_NA, ahead_NA, known_NA)

    def stated_NA(self, texts_NT: np.ndarray) -> np.ndarray:
        """Whether the text states the document's own value."""
        columns = [variable.stated(texts_NT) for variable in self.variables.values()]
        stated_NAT = np.stack(columns, axis=1)
        own_NAT = (stated_NAT == self.truth_NA[..., None]) & (stated_NAT != NOTHING)
        return own_NAT.any(axis=-1)

    def claims_NA(self, texts_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many values of each variable the text states, and how many of them are right.

        Where variables look alike in a text (two people), a value is right if it is that of any of
        them, and is counted under the first.
        """
        claims_NA, right_NA = np.zeros(self.truth_NA.shape), np.zeros(self.truth_NA.shape)
        for name, group in alike(self.variables).items():
            stated_NT = self.variables[name].stated(texts_NT)
            claimed_NT = stated_NT != NOTHING
            true_NT = np.any(stated_NT[:, :, None] == self.truth_NA[:, None, group], axis=-1)
            claims_NA[:, group[0]] = claimed_NT.sum(axis=1)
            right_NA[:, group[0]] = (claimed_NT & true_NT).sum(axis=1)
        return claims_NA, right_NA


def _places(
    variable: TokenVariable, truth_N: np.ndarray, rows: Rows
) -> tuple[np.ndarray, np.ndarray]:
    """``distance_NA`` and ``ahead_NA`` of one variable, [N] each."""
    places_S = np.arange(rows.tokens_NS.shape[1])
    # Negative before P.
    from_P_NS = places_S - rows.positions_N[:, None]
    own_NS = (variable.stated(rows.tokens_NS) == truth_N[:, None]) & (truth_N != NOTHING)[:, None]
    own_NS &= places_S < rows.lengths_N[:, None]
    seen_NS, later_NS = own_NS & (from_P_NS <= 0), own_NS & (from_P_NS > 0)
    seen_N, later_N = seen_NS.any(axis=1), later_NS.any(axis=1)
    far = len(places_S)
    last_N = np.where(seen_NS, -from_P_NS, far).min(axis=1)
    first_N = np.where(later_NS, from_P_NS, far).min(axis=1)
    distance_N = np.where(seen_N, last_N, NOTHING)
    return distance_N, np.where(later_N & ~seen_N, first_N, NOTHING)
