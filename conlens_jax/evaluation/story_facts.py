"""What is true of each row's story, what its context has said of it, and what a text states."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from conlens_jax.data.rows import Rows
from conlens_jax.data.stories import ATTRIBUTES, story
from conlens_jax.data.tokenizer import Tokenizer

NOT_MENTIONED = -1


def attribute_values(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Token ids of the values of each attribute; values that are not one token are left out."""
    values = {}
    for attribute, words in ATTRIBUTES.items():
        encoded = [tokenizer.encode(word) for word in words]
        values[attribute] = np.array(
            [ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_id], np.int32
        )
    return values


@dataclasses.dataclass(frozen=True)
class StoryFacts:
    """The attributes of N rows; the axis A is that of :attr:`values`.

    Attributes:
      values: attribute → token ids of all its values.
      truth_NA: token id of the story's own value, −1 where it is not one token.
      distance_NA: tokens from its last mention to P (0: at P), or :data:`NOT_MENTIONED` in the
        context up to P.
    """

    values: Mapping[str, np.ndarray]
    truth_NA: np.ndarray
    distance_NA: np.ndarray

    @property
    def mentioned_NA(self) -> np.ndarray:
        return self.distance_NA != NOT_MENTIONED

    @staticmethod
    def of(rows: Rows, tokenizer: Tokenizer, corpus_seed: int) -> StoryFacts:
        """Draws the stories of the rows again: a document's id is its place in the corpus."""
        values = attribute_values(tokenizer)
        single = {name: set(ids.tolist()) for name, ids in values.items()}
        truth_of: dict[int, list[int]] = {}
        for document in np.unique(rows.documents_N).tolist():
            attributes = story(corpus_seed, document).attributes
            ids = {name: tokenizer.encode(attributes[name])[0] for name in values}
            truth_of[document] = [ids[n] if ids[n] in single[n] else -1 for n in values]
        truth_NA = np.array([truth_of[document] for document in rows.documents_N.tolist()])
        places_S = np.arange(rows.tokens_NS.shape[1])
        seen_NS = places_S <= rows.positions_N[:, None]
        said_NAS = (rows.tokens_NS[:, None] == truth_NA[:, :, None]) & seen_NS[:, None]
        last_NA = np.where(said_NAS, places_S, -1).max(axis=-1)
        distance_NA = np.where(last_NA >= 0, rows.positions_N[:, None] - last_NA, NOT_MENTIONED)
        return StoryFacts(values, truth_NA, distance_NA)

    def stated_NA(self, texts_NT: np.ndarray) -> np.ndarray:
        """Whether the text holds the story's own value."""
        return np.any(texts_NT[:, None] == self.truth_NA[:, :, None], axis=-1)

    def claims_NA(self, texts_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many tokens of the text are values of each attribute, and how many of them are right.

        ``name`` and ``friend`` have one list: a person is right if it is either, and is counted
        under ``name`` alone.
        """
        names = list(self.values)
        claims_NA, right_NA = np.zeros(self.truth_NA.shape), np.zeros(self.truth_NA.shape)
        for index, name in enumerate(names):
            if name == "friend":
                continue
            truths = [index, names.index("friend")] if name == "name" else [index]
            claimed_NT = np.isin(texts_NT, self.values[name])
            true_NT = np.any(texts_NT[:, :, None] == self.truth_NA[:, None, truths], axis=-1)
            claims_NA[:, index] = claimed_NT.sum(axis=1)
            right_NA[:, index] = (claimed_NT & true_NT).sum(axis=1)
        return claims_NA, right_NA
