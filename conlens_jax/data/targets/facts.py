"""Targets of facts: what a generated document has stated up to P, the nearest first.

Of a story ``sled , green , anna``, of a sum ``hundreds carry 1 , tens 2 , tens carry 1 , ones 3``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from conlens_jax.corpora.generated import Variable
from conlens_jax.corpora.statements import NOTHING, token_variables
from conlens_jax.data.rows import Rows
from conlens_jax.data.targets.protocol import NextTokens, Targets
from conlens_jax.models.tokenizer import Tokenizer


class FactTargets(Targets):
    """Makes the target of each row: the values of the corpus's variables, each with the words that
    identify it (:attr:`~conlens_jax.corpora.generated.Variable.tag`).

    Args:
      comma: token between two facts; None: nothing is written there.
      text_len: the most tokens of a target, its end included.
    """

    def __init__(
        self,
        variables: Mapping[str, Variable],
        tokenizer: Tokenizer,
        comma: int | None,
        text_len: int,
    ):
        self._variables = token_variables(variables, tokenizer).values()
        self._comma = [] if comma is None else [comma]
        self._text_len = text_len

    def texts(self, rows: Rows, next_tokens: NextTokens | None = None) -> list[Sequence[int]]:
        """See :meth:`~.protocol.Targets.texts`."""
        stated: list[dict[tuple[int, ...], int]] = [{} for _ in range(len(rows))]
        before_NS = np.arange(rows.tokens_NS.shape[1]) <= rows.positions_N[:, None]
        for variable in self._variables:
            values_NS = np.where(before_NS, variable.stated(rows.tokens_NS), NOTHING)
            for row, index in np.argwhere(values_NS != NOTHING).tolist():
                fact = (*variable.tag, int(values_NS[row, index]))
                stated[row][fact] = max(index, stated[row].get(fact, 0))
        return [self._text(sorted(facts, key=lambda f: -facts[f])) for facts in stated]

    def _text(self, facts: Sequence[tuple[int, ...]]) -> list[int]:
        """The first facts that fit."""
        text: list[int] = []
        for fact in facts:
            longer = [*text, *(self._comma if text else ()), *fact]
            if len(longer) >= self._text_len:
                break
            text = longer
        return text
