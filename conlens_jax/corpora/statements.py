"""The variables of a generated corpus as tokens: where a text states the value of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from conlens_jax.corpora.generated import Variable
from conlens_jax.models.tokenizer import Tokenizer

NOTHING = -1


@dataclasses.dataclass(frozen=True)
class TokenVariable:
    """A :class:`~conlens_jax.corpora.generated.Variable` in the tokens of a model.

    Attributes:
      values_K: int32 ids of the values that are a single token.
      tag: ids of the tokens right before a value that identify the variable.
    """

    values_K: np.ndarray
    tag: tuple[int, ...] = ()

    def stated(self, tokens_NT: np.ndarray) -> np.ndarray:
        """The value's id at every position that states one, :data:`NOTHING` elsewhere; [N, T].
        A value whose tag is cut off by the beginning of the text does not count."""
        states_NT = np.isin(tokens_NT, self.values_K)
        length = tokens_NT.shape[1]
        for back, token in enumerate(reversed(self.tag), start=1):
            matches_NT = np.zeros_like(states_NT)
            matches_NT[:, back:] = tokens_NT[:, : max(length - back, 0)] == token
            states_NT &= matches_NT
        return np.where(states_NT, tokens_NT, NOTHING)

    def indistinguishable_from(self, other: TokenVariable) -> bool:
        """Whether a text cannot distinguish the two, as with the names of two people."""
        return self.tag == other.tag and np.array_equal(self.values_K, other.values_K)


def token_variables(
    variables: Mapping[str, Variable], tokenizer: Tokenizer
) -> dict[str, TokenVariable]:
    """By name. Values of several tokens are left out, and so are variables without any value left,
    or whose tag has a word that the tokenizer does not know."""
    found = {}
    for name, variable in variables.items():
        ids = [known_ids(word, tokenizer) for word in variable.values]
        tag = [known_ids(word, tokenizer) for word in variable.tag]
        values_K = np.array([i[0] for i in ids if len(i) == 1], np.int32)
        if all(tag) and len(values_K):
            found[name] = TokenVariable(values_K, tuple(token for i in tag for token in i))
    return found


def alike(variables: Mapping[str, TokenVariable]) -> dict[str, list[int]]:
    """The variables that a text can tell apart: name of the first of each group → indices of all
    variables of the group."""
    groups: dict[str, list[int]] = {}
    for index, variable in enumerate(variables.values()):
        same = (name for name in groups if variables[name].indistinguishable_from(variable))
        groups.setdefault(next(same, list(variables)[index]), []).append(index)
    return groups


def known_ids(word: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a word; empty if the tokenizer does not know it."""
    ids = tokenizer.encode(word)
    return [] if tokenizer.unk_id in ids else ids
