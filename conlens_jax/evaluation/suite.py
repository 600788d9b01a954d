"""The metrics of a lens with their controls, each with an interval over documents.

Names follow one pattern. Without a prefix a metric belongs to greedy decoding; ``sampled_`` is one
sample a row; ``null_shuffle_`` reads the text of another row, ``null_novec_`` the text that the
decoder writes from the mean activation; ``last_tokens_`` and ``window_`` give the encoder true
text instead of an explanation. ``fve_nrm_at_k`` reads only the first k tokens of the text.
``kl_frac_X`` is the share of the KL of swapping in X that is
removed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from conlens_jax.config import WarmConfig
from conlens_jax.data.rows import Rows
from conlens_jax.data.stories import ATTRIBUTES
from conlens_jax.data.tokenizer import Tokenizer
from conlens_jax.evaluation import metrics
from conlens_jax.evaluation.bootstrap import (
    DocumentBootstrap,
    Interval,
    Statistic,
    percentile_interval,
)
from conlens_jax.evaluation.measure import Effect, Explained, Measurer, Reference, other_rows
from conlens_jax.evaluation.metrics import fraction_removed, fve_nrm_reference
from conlens_jax.models.param_table import Params

HEADLINE = ("fve_nrm", "kl_frac_mean", "sampled_fve_nrm", "sampled_kl_frac_mean")
REFERENCES = ("mean", "zero", "other")
PerRow = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One lens on one set of rows.

    Attributes:
      explained: its texts and reconstructions.
      effects: what M predicts with each candidate swapped in; ``clean`` is without a swap.
      per_row: the quantities that the metrics are means of.
      metrics: name → value and interval.
    """

    explained: Explained
    effects: dict[str, Effect]
    per_row: PerRow
    metrics: dict[str, Interval]


@dataclasses.dataclass(frozen=True)
class Suite:
    """The rows, and all that does not depend on which lens is measured."""

    measurer: Measurer
    rows: Rows
    reference: Reference
    bootstrap: DocumentBootstrap
    partner_N: np.ndarray
    warm: WarmConfig
    attribute_ids: frozenset[int]
    baseline: Params | None

    @staticmethod
    def make(
        measurer: Measurer,
        rows: Rows,
        reference: Reference,
        warm: WarmConfig,
        attribute_ids: frozenset[int],
        *,
        n_resamples: int,
        seed: int,
        baseline: Params | None = None,
    ) -> Suite:
        """Draws the resamples, one set for all metrics and lenses, so that they are paired.

        Args:
          attribute_ids: tokens that state an attribute of a story; empty for other corpora.
          baseline: trained parts of an encoder that reads the true last T tokens; where there is
            none, each lens's own encoder reads them, which it has not learnt.
        """
        bootstrap = DocumentBootstrap.draw(rows.documents_N, n_resamples, seed)
        partner_N = other_rows(rows.documents_N)
        return Suite(measurer, rows, reference, bootstrap, partner_N, warm, attribute_ids, baseline)

    def evaluate(self, trainable: Params, frozen: Params) -> Evaluated:
        """Every metric of one lens."""
        actual, measurer = self.rows.activations_ND, self.measurer
        explained = measurer.explain(trainable, frozen, self.rows)
        mean_ND = np.broadcast_to(self.reference.mean_D, actual.shape)
        blind = dataclasses.replace(self.rows, activations_ND=np.array(mean_ND))
        unseeing = measurer.explain(trainable, frozen, blind).reconstructions
        own = explained.reconstructions
        text_len = self.warm.before + self.warm.after
        reader = trainable if self.baseline is None else {**trainable, **self.baseline}
        candidates = {
            **own,
            "null_shuffle": own["greedy"][self.partner_N],
            "null_shuffle_sampled": own["sampled"][self.partner_N],
            "null_novec": unseeing["greedy"],
            "null_novec_sampled": unseeing["sampled"],
            "last_tokens": measurer.read(reader, frozen, self._window(text_len, 0)),
            "window": measurer.read(
                trainable, frozen, self._window(self.warm.before, self.warm.after)
            ),
            "mean": mean_ND,
            "zero": np.zeros_like(actual),
            "other": actual[self.partner_N],
            "self": actual,
        }
        effects = measurer.effects(frozen["original"], self.rows, candidates)
        per_row = self._per_row(candidates, effects)
        per_row |= self._text_rows(explained, effects["clean"], frozen["original"])
        return Evaluated(explained, effects, per_row, self._metrics(per_row, explained))

    def differences(self, later: Evaluated, earlier: Evaluated) -> dict[str, Interval]:
        """Later minus earlier for each of :data:`HEADLINE`, paired by document."""
        return {
            name: self.bootstrap.difference(statistic, later.per_row, earlier.per_row)
            for name, statistic in self._statistics().items()
            if name in HEADLINE
        }

    def _window(self, before: int, after: int) -> np.ndarray:
        """True tokens around P; where the document does not reach back so far, its first one is
        repeated."""
        offsets = self.rows.positions_N[:, None] + np.arange(1 - before, after + 1)
        return self.rows.tokens_NS[np.arange(len(self.rows))[:, None], np.maximum(offsets, 0)]

    def _per_row(
        self, candidates: Mapping[str, np.ndarray], effects: Mapping[str, Effect]
    ) -> PerRow:
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

    def _text_rows(self, explained: Explained, clean: Effect, original: Params) -> PerRow:
        about_to_use = clean.top_tokens[:, 0]
        is_attribute = np.isin(about_to_use, sorted(self.attribute_ids))
        states = lambda texts: np.any(texts == about_to_use[:, None], axis=1) & is_attribute
        window = self._window(self.warm.before, self.warm.after)
        per_row = {"attribute": is_attribute}
        per_row["window.nll"] = self.measurer.text_nll(original, window)
        for name, cos_NT in explained.prefix_cos.items():
            per_row |= {f"{name}.cos_at_{k}": cos_NT[:, k - 1] for k in prefix_lengths(cos_NT)}
        for name, texts in explained.texts.items():
            per_row[f"{name}.nll"] = self.measurer.text_nll(original, texts)
            per_row[f"{name}.repeat_4gram"] = metrics.repeat_4gram(texts)
            per_row[f"{name}.stated"] = states(texts)
            per_row[f"{name}.stated_shuffled"] = states(texts[self.partner_N])
        return per_row

    def _metrics(self, per_row: PerRow, explained: Explained) -> dict[str, Interval]:
        means = self.bootstrap.means(per_row)
        intervals = {
            name: percentile_interval(np.asarray(statistic(means)))
            for name, statistic in self._statistics(explained).items()
        }
        # Over all texts at once: repeated documents would bias a resample of it.
        for name, prefix in (("greedy", ""), ("sampled", "sampled_")):
            intervals[f"{prefix}distinct_2"] = Interval(metrics.distinct_2(explained.texts[name]))
        return intervals

    def _statistics(self, explained: Explained | None = None) -> dict[str, Statistic]:
        """Each metric as a function of named means over rows; without texts, those that every lens
        has."""
        statistics: dict[str, Statistic] = {}
        for name, cos_NT in explained.prefix_cos.items() if explained else ():
            for k in prefix_lengths(cos_NT):
                key = f"{'' if name == 'greedy' else name + '_'}fve_nrm_at_{k}"
                statistics[key] = _fve_nrm(f"{name}.cos_at_{k}", self.reference.resultant)
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
            statistics |= _reconstruction_statistics(candidate, prefix, self.reference.resultant)
        statistics["kl_floor"] = _mean("self.kl_at")
        for name in REFERENCES:
            statistics[f"kl_{name}"] = _mean(f"{name}.kl_at")
        for name, prefix in (("greedy", ""), ("sampled", "sampled_")):
            statistics[f"{prefix}nll_text"] = _mean(f"{name}.nll")
            statistics[f"{prefix}repeat_4gram"] = _mean(f"{name}.repeat_4gram")
            if self.attribute_ids:
                statistics |= _attribute_statistics(name, prefix)
        statistics["nll_window"] = _mean("window.nll")
        return statistics


def _mean(name: str) -> Statistic:
    return lambda means: means[name]


def _fve_nrm(cos: str, resultant: float) -> Statistic:
    return lambda means: fraction_removed(metrics.mse_nrm(means[cos]), fve_nrm_reference(resultant))


def prefix_lengths(cos_NT: np.ndarray) -> list[int]:
    """The k of ``fve_nrm_at_k``: 1, 2, 4, … and T."""
    text_len = cos_NT.shape[1]
    return [2**i for i in range(text_len.bit_length()) if 2**i < text_len] + [text_len]


def _reconstruction_statistics(candidate: str, prefix: str, resultant: float) -> dict:
    of = lambda quantity: f"{candidate}.{quantity}"
    statistics: dict[str, Statistic] = {
        "cos": _mean(of("cos")),
        "fve_nrm": _fve_nrm(of("cos"), resultant),
        "fve_raw": lambda means: fraction_removed(means[of("error")], means["spread"]),
        "kl_at": _mean(of("kl_at")),
        "kl_cont": _mean(of("kl_cont")),
        "top1_agree": _mean(of("top1")),
        "ce_rec": lambda means: metrics.cross_entropy_recovered(
            means["mean.ce"], means[of("ce")], means["clean.ce"]
        ),
    }
    for reference in REFERENCES:
        statistics[f"kl_frac_{reference}"] = lambda means, reference=reference: fraction_removed(
            means[of("kl_at")], means[f"{reference}.kl_at"]
        )
    return {prefix + name: statistic for name, statistic in statistics.items()}


def _attribute_statistics(name: str, prefix: str) -> dict[str, Statistic]:
    """How often the text states the attribute word that M is about to use, given that it is."""
    own, other = f"{name}.stated", f"{name}.stated_shuffled"

    def ratio(numerator: str, denominator: str) -> Statistic:
        def statistic(means):
            with np.errstate(divide="ignore", invalid="ignore"):
                return means[numerator] / means[denominator]

        return statistic

    return {
        f"{prefix}attribute_stated": ratio(own, "attribute"),
        f"{prefix}null_shuffle_attribute_stated": ratio(other, "attribute"),
        f"{prefix}attribute_ratio": ratio(own, other),
    }


def attribute_token_ids(corpus_kind: str, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the words that are values of a story's attributes; empty for other corpora."""
    if corpus_kind != "stories":
        return frozenset()
    encoded = [tokenizer.encode(word) for words in ATTRIBUTES.values() for word in words]
    return frozenset(ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_id)
