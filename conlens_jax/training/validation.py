"""Validation during training: scores with their controls, and samples to read."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from conlens_jax.data.rows import Rows
from conlens_jax.measurement import metrics
from conlens_jax.measurement.runner import SwapEffect, other_rows
from conlens_jax.models.param_table import Params
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.written import before_end, written_texts
from conlens_jax.training.collapse import collapse_warning
from conlens_jax.training.run import Run

_SHOWN = 8
_OTHER_TOKENS = (
    "              (read again, it gives other tokens; the numbers are of those written)\n"
)


@dataclasses.dataclass(frozen=True)
class Validation:
    """The result of a validation.

    Attributes:
      scores: by name.
      token_shares: the most common tokens of the sampled texts, each with its share.
      distributions: per-row values by name, [N]: ``cos_…`` and ``kl_at_…`` (nats), of greedy and
        sampled text and of another row's.
      warning: what is wrong with the texts, or empty.
    """

    scores: dict[str, float]
    token_shares: Sequence[tuple[str, float]] = ()
    distributions: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    warning: str = ""

    @property
    def common_tokens(self) -> str:
        """The first of ``token_shares``, for the console."""
        return " ".join(f"{token}:{share:.0%}" for token, share in self.token_shares[:_SHOWN])


def validate(run: Run, trainable: Params, frozen: Params) -> Validation:
    """Scores on the first ``train.validation_rows`` held-out rows.

    ``kl_frac`` is relative to the mean activation; ``shuffle`` reads another row's text.
    ``gap_frozen`` is the fve_nrm of greedy text read by the encoder, minus that read by the encoder
    of the warm start's end: a private code between decoder and encoder shows here first.
    ``kl_floor`` is the KL of swapping in the activation itself.
    """
    count = min(run.config.train.validation_rows, len(run.validation))
    rows = run.validation.rows(np.arange(count))
    explained = run.measurer.explain(trainable, frozen, rows)
    actual = rows.activations_ND
    vectors = {
        **explained.reconstructions,
        "shuffle": explained.reconstructions["sampled"][other_rows(rows.documents_N)],
        "mean": np.broadcast_to(run.reference.mean_D, actual.shape),
        "self": actual,
    }
    effects = run.measurer.effects(frozen["original"], rows, vectors)
    scores, distributions = {}, {}
    for name in ("greedy", "sampled", "shuffle"):
        cos = metrics.cosine(vectors[name], actual)
        distributions |= {f"cos_{name}": cos, f"kl_at_{name}": effects[name].kl_at}
        scores[f"fve_nrm_{name}"] = metrics.fve_nrm(cos, run.reference.resultant)
        scores[f"kl_frac_{name}"] = metrics.kl_frac(effects[name].kl_at, effects["mean"].kl_at)
    scores["kl_at_sampled"] = float(effects["sampled"].kl_at.mean())
    scores["kl_floor"] = float(effects["self"].kl_at.mean())
    if run.warm_encoder is not None:
        reader = {**trainable, "encoder": run.warm_encoder}
        read = run.measurer.read(reader, frozen, explained.texts["greedy"])
        by_warm = metrics.fve_nrm(metrics.cosine(read, actual), run.reference.resultant)
        scores["gap_frozen"] = scores["fve_nrm_greedy"] - by_warm
    texts = [before_end(text, run.session.spec.end) for text in explained.texts["sampled"]]
    if run.session.spec.end is not None:
        length_N = np.array([len(text) for text in texts])
        scores["text_tokens"] = float(length_N.mean())
        scores["text_cut"] = float(np.mean(length_N == run.session.spec.text_len))
    scores["distinct_2"] = metrics.distinct_2(texts)
    scores["repeat_4gram"] = float(metrics.repeat_4gram(texts).mean())
    own, shuffled = distributions["cos_sampled"], distributions["cos_shuffle"]
    resultant, config = run.reference.resultant, run.config
    warning = collapse_warning(own, shuffled, rows.documents_N, resultant, config)
    shares = token_shares(texts, run.session.model.tokenizer)
    return Validation(scores, shares, distributions, warning)


def token_shares(
    texts: Sequence[Sequence[int]], tokenizer: Tokenizer, count: int = 32
) -> list[tuple[str, float]]:
    """The most common tokens with their shares of all tokens, most common first."""
    counts = collections.Counter(itertools.chain.from_iterable(texts))
    shown = counts.most_common(count)
    return [(tokenizer.token(token), times / counts.total()) for token, times in shown]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One row, to be read by a person.

    ``tokens`` are those of the explanation, and the numbers are of them; ``reads_back`` is whether
    its text, tokenised again, gives the same tokens.
    """

    context: str
    continuation: str
    explanation: str
    cos: float
    kl: float
    top_before: str
    top_after: str
    tokens: tuple[int, ...] = ()
    reads_back: bool = True

    def text(self) -> str:
        return (
            f"context       … {self.context} | {self.continuation} …\n"
            f"explanation   {self.explanation}\n"
            f"{'' if self.reads_back else _OTHER_TOKENS}"
            f"cos {self.cos:.3f}   KL {self.kl:.3f} nats\n"
            f"M predicts    {self.top_before}\n"
            f"after swap    {self.top_after}"
        )


def verbose_samples(run: Run, trainable: Params, frozen: Params, count: int) -> list[Sample]:
    """Greedy explanations of ``count`` held-out rows, spread over the validation split."""
    spread = np.linspace(0, len(run.validation) - 1, count).astype(np.int64)
    rows = run.validation.rows(spread)
    tokenizer = run.session.model.tokenizer
    explained = run.measurer.explain(trainable, frozen, rows)
    vectors = explained.reconstructions["greedy"]
    effects = run.measurer.effects(frozen["original"], rows, {"greedy": vectors})
    cos = metrics.cosine(vectors, rows.activations_ND)
    contexts = [context_of(rows, i, tokenizer) for i in range(count)]
    texts = written_texts(explained.texts["greedy"], tokenizer, run.session.spec.end)
    return [
        Sample(
            context=before,
            continuation=after,
            explanation=str(texts[i]),
            cos=float(cos[i]),
            kl=float(effects["greedy"].kl_at[i]),
            top_before=_listed(effects["clean"], i, tokenizer),
            top_after=_listed(effects["greedy"], i, tokenizer),
            tokens=texts[i].tokens,
            reads_back=texts[i].reads_back,
        )
        for i, (before, after) in enumerate(contexts)
    ]


def context_of(
    rows: Rows, index: int, tokenizer: Tokenizer, before: int = 24, after: int = 6
) -> tuple[str, str]:
    """The text up to and including P, and the text after it."""
    position, tokens = int(rows.positions_N[index]), rows.tokens_NS[index]
    stop = min(position + 1 + after, int(rows.lengths_N[index]))
    start = max(0, position + 1 - before)
    return tokenizer.decode(tokens[start : position + 1]), tokenizer.decode(
        tokens[position + 1 : stop]
    )


def _listed(effect: SwapEffect, index: int, tokenizer: Tokenizer) -> str:
    return "  ".join(
        f"{tokenizer.token(token)} {probability:.2f}"
        for token, probability in zip(
            effect.top_tokens[index], effect.top_probabilities[index], strict=True
        )
    )
