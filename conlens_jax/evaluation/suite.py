"""The metrics of a lens with their controls, each with an interval over documents.

Names follow one pattern. Without a prefix a metric belongs to greedy decoding; ``sampled_`` is one
sample per row; ``null_shuffle_`` reads the text of another row, ``null_novec_`` the text that the
decoder writes from the mean activation; ``last_tokens_`` and ``window_`` give the encoder true
text instead of an explanation. ``fve_nrm_at_k`` reads only the first k tokens of the text.
``kl_frac_X`` is the share of the KL of swapping in X that is removed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from conlens_jax.config import WarmConfig
from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.corpora.statements import token_variables
from conlens_jax.data.rows import Rows
from conlens_jax.measurement import metrics
from conlens_jax.measurement.aggregates import (
    REFERENCES,
    attribute_statistics,
    doublings,
    fve_nrm_of,
    mean_of,
    reconstruction_statistics,
)
from conlens_jax.measurement.bootstrap import (
    DocumentBootstrap,
    Interval,
    Statistic,
    percentile_interval,
)
from conlens_jax.measurement.runner import (
    ActivationStatistics,
    Explained,
    Measurer,
    SwapEffect,
    other_rows,
)
from conlens_jax.models.param_table import Params
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.written import before_end

HEADLINE = ("fve_nrm", "kl_frac_mean", "sampled_fve_nrm", "sampled_kl_frac_mean")
PerRow = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One lens on one set of rows.

    Attributes:
      explained: its texts and reconstructions.
      without_vector: what it writes of the mean activation; greedily, one text for all rows.
      effects: what M predicts with each candidate swapped in; ``clean`` is without a swap.
      per_row: the quantities that the metrics are means of.
      metrics: name → value and interval.
    """

    explained: Explained
    without_vector: Explained
    effects: dict[str, SwapEffect]
    per_row: PerRow
    metrics: dict[str, Interval]


@dataclasses.dataclass(frozen=True)
class Suite:
    """The rows, and everything else that does not depend on the lens."""

    measurer: Measurer
    rows: Rows
    reference: ActivationStatistics
    bootstrap: DocumentBootstrap
    partner_N: np.ndarray
    warm: WarmConfig
    attribute_ids: frozenset[int]
    baseline: Params | None

    @staticmethod
    def make(
        measurer: Measurer,
        rows: Rows,
        reference: ActivationStatistics,
        warm: WarmConfig,
        attribute_ids: frozenset[int],
        *,
        n_resamples: int,
        seed: int,
        baseline: Params | None = None,
    ) -> Suite:
        """Draws the resamples, one set for all metrics and lenses, so that they are paired.

        Args:
          attribute_ids: of :func:`attribute_token_ids`.
          baseline: trained parts of an encoder that reads the true last T tokens; without one,
            each lens's own encoder reads them, which it was not trained for.
        """
        bootstrap = DocumentBootstrap.draw(rows.documents_N, n_resamples, seed)
        partner_N = other_rows(rows.documents_N)
        return Suite(measurer, rows, reference, bootstrap, partner_N, warm, attribute_ids, baseline)

    def evaluate(self, trainable: Params, frozen: Params) -> Evaluated:
        """Every metric of one lens."""
        actual, measurer = self.rows.activations_ND, self.measurer
        explained = measurer.explain(trainable, frozen, self.rows)
        mean_ND = np.broadcast_to(self.reference.mean_D, actual.shape)
        mean_rows = dataclasses.replace(self.rows, activations_ND=np.array(mean_ND))
        without_vector = measurer.explain(trainable, frozen, mean_rows)
        own = explained.reconstructions
        text_len = measurer.spec.text_len
        reader = trainable if self.baseline is None else {**trainable, **self.baseline}
        candidates = {
            **own,
            "null_shuffle": own["greedy"][self.partner_N],
            "null_shuffle_sampled": own["sampled"][self.partner_N],
            "null_novec": without_vector.reconstructions["greedy"],
            "null_novec_sampled": without_vector.reconstructions["sampled"],
            "last_tokens": measurer.read(reader, frozen, self.window(text_len, 0)),
            "window": measurer.read(trainable, frozen, self.targets_NT),
            "mean": mean_ND,
            "zero": np.zeros_like(actual),
            "other": actual[self.partner_N],
            "self": actual,
        }
        effects = measurer.effects(frozen["original"], self.rows, candidates)
        per_row = self.quantities(candidates, effects)
        per_row |= self._text_rows(explained, effects["clean"], frozen["original"])
        found = self._metrics(per_row, explained)
        return Evaluated(explained, without_vector, effects, per_row, found)

    def score(
        self, evaluated: Evaluated, original: Params, candidates: Mapping[str, np.ndarray]
    ) -> PerRow:
        """The quantities of more candidates [N, D], beside those of an evaluated lens."""
        effects = self.measurer.effects(original, self.rows, candidates)
        return {**evaluated.per_row, **self.quantities(candidates, effects)}

    def intervals(
        self, statistics: Mapping[str, Statistic], per_row: PerRow
    ) -> dict[str, Interval]:
        """Each statistic with its interval, over the one set of resamples."""
        means = self.bootstrap.means(per_row)
        return {
            name: percentile_interval(np.asarray(statistic(means)))
            for name, statistic in statistics.items()
        }

    def differences(self, later: Evaluated, earlier: Evaluated) -> dict[str, Interval]:
        """Later minus earlier for each of :data:`HEADLINE`, paired by document."""
        return {
            name: self.bootstrap.difference(statistic, later.per_row, earlier.per_row)
            for name, statistic in self._statistics().items()
            if name in HEADLINE
        }

    def window(self, before: int, after: int) -> np.ndarray:
        """True tokens around P; before the start of the document its first token is repeated."""
        offsets = self.rows.positions_N[:, None] + np.arange(1 - before, after + 1)
        return self.rows.tokens_NS[np.arange(len(self.rows))[:, None], np.maximum(offsets, 0)]

    @functools.cached_property
    def targets_NT(self) -> np.ndarray:
        """The texts that the warm start teaches for these rows, [N, T]."""
        if self.rows.targets_NT.shape[1]:
            return self.rows.targets_NT
        return self.window(self.warm.before, self.warm.after)

    def before_end(self, texts_NT: np.ndarray) -> list[tuple[int, ...]]:
        """The tokens of each text before its end."""
        return [before_end(text, self.measurer.spec.end) for text in texts_NT]

    def lengths(self, texts_NT: np.ndarray, name: str) -> PerRow:
        """``tokens`` of each text before its end, and ``cut``: it has no end; nothing of a lens
        whose texts do not end."""
        if self.measurer.spec.end is None:
            return {}
        length_N = np.array([len(tokens) for tokens in self.before_end(texts_NT)])
        return {f"{name}.tokens": length_N, f"{name}.cut": length_N == texts_NT.shape[1]}

    def quantities(
        self, candidates: Mapping[str, np.ndarray], effects: Mapping[str, SwapEffect]
    ) -> PerRow:
        """What the statistics of each candidate are means of, one number per row."""
        actual, clean = self.rows.activations_ND, effects["clean"]
        per_row: PerRow = {"spread": metrics.squared_error(actual, self.reference.mean_D)}
        per_row["clean.ce"] = clean.ce
        for name, vectors in candidates.items():
            effect = effects[name]
            per_row[f"{name}.cos"] = metrics.cosine(vectors, actual)
            per_row[f"{name}.error"] = metrics.squared_error(vectors, actual)
            per_row[f"{name}.kl_at"] = effect.kl_at
            per_row[f"{name}.kl_cont"] = effect.kl_cont
            per_row[f"{name}.ce"] = effect.ce
            per_row[f"{name}.top1"] = metrics.top1_agreement(
                effect.top_tokens[:, 0], clean.top_tokens[:, 0]
            )
        return per_row

    def _text_rows(self, explained: Explained, clean: SwapEffect, original: Params) -> PerRow:
        next_token_N = clean.top_tokens[:, 0]
        is_attribute = np.isin(next_token_N, sorted(self.attribute_ids))
        states = lambda texts: np.any(texts == next_token_N[:, None], axis=1) & is_attribute
        per_row = {"attribute": is_attribute}
        per_row["window.nll"] = self.measurer.text_nll(original, self.targets_NT)
        for name, cos_NT in explained.prefix_cos.items():
            per_row |= {f"{name}.cos_at_{k}": cos_NT[:, k - 1] for k in doublings(cos_NT.shape[1])}
        for name, texts in explained.texts.items():
            per_row[f"{name}.nll"] = self.measurer.text_nll(original, texts)
            per_row[f"{name}.repeat_4gram"] = metrics.repeat_4gram(self.before_end(texts))
            per_row |= self.lengths(texts, name)
            per_row[f"{name}.stated"] = states(texts)
            per_row[f"{name}.stated_shuffled"] = states(texts[self.partner_N])
        return per_row

    def _metrics(self, per_row: PerRow, explained: Explained) -> dict[str, Interval]:
        intervals = self.intervals(self._statistics(explained), per_row)
        # Over all texts together: a resample repeats documents, which would bias it.
        for name, prefix in (("greedy", ""), ("sampled", "sampled_")):
            words = self.before_end(explained.texts[name])
            intervals[f"{prefix}distinct_2"] = Interval(metrics.distinct_2(words))
        return intervals

    def _statistics(self, explained: Explained | None = None) -> dict[str, Statistic]:
        """Each metric as a function of named means over rows; without texts, those that every lens
        has."""
        statistics: dict[str, Statistic] = {}
        for name, cos_NT in explained.prefix_cos.items() if explained else ():
            for k in doublings(cos_NT.shape[1]):
                key = f"{'' if name == 'greedy' else name + '_'}fve_nrm_at_{k}"
                statistics[key] = fve_nrm_of(f"{name}.cos_at_{k}", self.reference.resultant)
        for candidate, prefix in (
            ("greedy", ""),
            ("sampled", "sampled_"),
            ("null_shuffle", "null_shuffle_"),
            ("null_shuffle_sampled", "null_shuffle_sampled_"),
            ("null_novec", "null_novec_"),
            ("null_novec_sampled", "null_novec_sampled_"),
            ("last_tokens", "last_tokens_"),
            ("window", "window_"),
        ):
            statistics |= reconstruction_statistics(candidate, prefix, self.reference.resultant)
        statistics["kl_floor"] = mean_of("self.kl_at")
        for name in REFERENCES:
            statistics[f"kl_{name}"] = mean_of(f"{name}.kl_at")
        for name, prefix in (("greedy", ""), ("sampled", "sampled_")):
            statistics[f"{prefix}nll_text"] = mean_of(f"{name}.nll")
            statistics[f"{prefix}repeat_4gram"] = mean_of(f"{name}.repeat_4gram")
            if self.measurer.spec.end is not None:
                statistics[f"{prefix}text_tokens"] = mean_of(f"{name}.tokens")
                statistics[f"{prefix}text_cut"] = mean_of(f"{name}.cut")
            if self.attribute_ids:
                statistics |= attribute_statistics(name, prefix)
        statistics["nll_window"] = mean_of("window.nll")
        return statistics


def attribute_token_ids(corpus_kind: str, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the words that state a variable of a generated corpus by themselves, as the words of
    the stories do; none for other corpora."""
    generator = GENERATORS.get(corpus_kind)
    if generator is None:
        return frozenset()
    variables = token_variables(generator.variables, tokenizer).values()
    return frozenset(int(i) for v in variables if not v.tag for i in v.values_K)
