"""What the parts of an explanation are worth, and what it adds to M's output
(``target.kind="words"``).

An explanation says what M is about to say, then words of the context. The first part repeats M's
output. So the words of the context must add something to it, and the whole text something to M's
own likeliest next tokens.

An encoder cannot read a first part by itself: it has seen texts with two parts only, and a shorter
one misleads it, even if the missing part was nothing but gaps. So the second part is not cut off
but taken from other rows, and the mean of the reconstructions is what the encoder makes of the
first part when it learns nothing from the second. (On a first part it agrees with an encoder that
has been trained on first parts.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from conlens_jax.config import TargetConfig
from conlens_jax.data.targets.opening import mark_ids
from conlens_jax.data.targets.protocol import filled
from conlens_jax.data.targets.words import context_words_only, next_words_only
from conlens_jax.evaluation.suite import Evaluated, Suite
from conlens_jax.measurement.aggregates import difference_of, reconstruction_statistics
from conlens_jax.measurement.bootstrap import Interval, Statistic
from conlens_jax.models.param_table import Params
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.written import before_end

OTHERS = 8
"""Rows whose second parts stand in for a row's own."""
SHORT = ("fve_nrm", "kl_frac_mean", "top1_agree")
ADDED = ("fve_nrm", "kl_frac_mean")


@dataclasses.dataclass(frozen=True)
class WordParts:
    """Measures the parts of texts on a suite's rows; ``separator`` is the token between them."""

    suite: Suite
    separator: int

    @staticmethod
    def of(target: TargetConfig, tokenizer: Tokenizer, suite: Suite) -> WordParts | None:
        """None where texts have no two parts that can be told apart."""
        separator = mark_ids(target, tokenizer).get("separator")
        return None if separator is None else WordParts(suite, separator)

    def of_lens(
        self, evaluated: Evaluated, trainable: Params, frozen: Params
    ) -> dict[str, Interval]:
        """Of the greedy text, by the lens's own encoder: ``next_only_…`` and ``context_only_…``
        have one part each, ``context_adds_…`` is the whole text minus ``next_only_…``."""
        greedy = evaluated.explained.texts["greedy"]
        vectors = self._parts_read(trainable, frozen, greedy)
        per_row = self.suite.score(evaluated, frozen["original"], vectors)
        statistics = self._statistics(vectors)
        statistics |= self._differences("context_adds", "greedy", "next_only")
        return self.suite.intervals(statistics, per_row)

    def audited(
        self,
        evaluated: Evaluated,
        trainable: Params,
        frozen: Params,
        auditor: Params,
        next_words_reader: Params,
    ) -> dict[str, Interval]:
        """The same by the audit encoder (``frozen_…``), and ``next_tokens_…``: M's own likeliest
        next tokens, the first part of the target, read by the encoder that is trained for them.
        ``text_adds_…`` is the greedy text (audit encoder) minus ``next_tokens_…``.

        Args:
          auditor, next_words_reader: ``{"encoder": …}`` of :mod:`conlens_jax.training.auditor`.
        """
        suite, end = self.suite, self.suite.measurer.spec.end
        greedy, audited = evaluated.explained.texts["greedy"], {**trainable, **auditor}
        parts = self._parts_read(audited, frozen, greedy)
        vectors = {f"frozen_{name}": vectors_ND for name, vectors_ND in parts.items()}
        vectors["next_tokens"] = suite.measurer.read(
            {**trainable, **next_words_reader},
            frozen,
            next_words_only(suite.targets_NT, self.separator, end),
        )
        statistics = self._statistics(vectors)
        vectors["frozen_greedy"] = suite.measurer.read(audited, frozen, greedy)
        per_row = suite.score(evaluated, frozen["original"], vectors)
        statistics |= self._differences(
            "frozen_context_adds", "frozen_greedy", "frozen_next_only"
        ) | self._differences("text_adds", "frozen_greedy", "next_tokens")
        return suite.intervals(statistics, per_row)

    def _parts_read(
        self, reader: Params, frozen: Params, texts_NT: np.ndarray
    ) -> dict[str, np.ndarray]:
        measurer = self.suite.measurer
        first_NT = next_words_only(texts_NT, self.separator, measurer.spec.end)
        second_NT = context_words_only(texts_NT, self.separator, measurer.spec.end)
        has_second_N1 = np.any(texts_NT == self.separator, axis=1, keepdims=True)
        # In float64: the mean of equal reconstructions is that reconstruction, to the last bit.
        sum_ND = np.zeros(self.suite.rows.activations_ND.shape, np.float64)
        for other_N in self._others():
            mixed_NT = self._joined(first_NT, second_NT[other_N])
            sum_ND += measurer.read(reader, frozen, np.where(has_second_N1, mixed_NT, texts_NT))
        return {
            "next_only": (sum_ND / OTHERS).astype(np.float32),
            "context_only": measurer.read(reader, frozen, second_NT),
        }

    def _others(self) -> list[np.ndarray]:
        """For each row :data:`OTHERS` rows of other documents, at equal distances."""
        documents_N, others = self.suite.rows.documents_N, []
        order = np.argsort(documents_N, kind="stable")
        for k in range(1, OTHERS + 1):
            other_N = np.empty(len(order), np.int64)
            other_N[order] = np.roll(order, len(order) * k // (OTHERS + 1))
            is_same_N = documents_N[other_N] == documents_N
            others.append(np.where(is_same_N, self.suite.partner_N, other_N))
        return others

    def _joined(self, first_NT: np.ndarray, second_NT: np.ndarray) -> np.ndarray:
        """Texts of two parts; what does not fit before the end is left out."""
        end, text_len = self.suite.measurer.spec.end, first_NT.shape[1]
        texts = [
            (*before_end(first, end), *before_end(second, end))
            for first, second in zip(first_NT, second_NT, strict=True)
        ]
        return filled([text[: text_len - 1] for text in texts], text_len, end)

    def _statistics(self, candidates: Iterable[str]) -> dict[str, Statistic]:
        statistics: dict[str, Statistic] = {}
        for name in candidates:
            statistics |= self._of(name, SHORT, f"{name}_")
        return statistics

    def _of(self, candidate: str, only: Sequence[str], prefix: str = "") -> dict[str, Statistic]:
        return reconstruction_statistics(candidate, prefix, self.suite.reference.resultant, only)

    def _differences(self, name: str, first: str, second: str) -> dict[str, Statistic]:
        one, other = self._of(first, ADDED), self._of(second, ADDED)
        return {f"{name}_{metric}": difference_of(one[metric], other[metric]) for metric in ADDED}
