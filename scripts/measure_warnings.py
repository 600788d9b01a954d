"""How often rows with a warning are right, and rows without: next words of a lens on any corpus.

Command:  python scripts/measure_warnings.py --checkpoint=runs/quickstart --corpus=stdlib
Time:     on 2 CPU cores half a minute for the quickstart's lens.

The beginnings of held-out documents of a corpus, every position. A next word is right if it begins
with one of M's five likeliest tokens. Intervals: 95 %, bootstrap by document.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
from absl import flags

import conlens_jax
from conlens_jax import cli
from conlens_jax.checkpoint_flags import one_checkpoint
from conlens_jax.config import ConfigError, CorpusConfig
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.evaluation.claims import NEXT, claim_reader
from conlens_jax.measurement.aggregates import ratio_of
from conlens_jax.measurement.bootstrap import DocumentBootstrap
from conlens_jax.models.written import before_end
from conlens_jax.tracking.console import Console

_CORPUS = flags.DEFINE_string("corpus", "stories", "corpus.kind: stories, sums or stdlib.")
_DOCUMENTS = flags.DEFINE_integer("documents", 40, "Documents to explain.", lower_bound=2)
_WORDS = flags.DEFINE_integer("words", 60, "Words of each, separated by white space.", 1)
_REASONS = {
    "position": "no position",
    "norm": "norm",
    "token": "had the token",
    "worse than the mean": "mean activation",
}


def main() -> None:
    lens = conlens_jax.Lens.load(one_checkpoint())
    if lens.calibration is None:
        raise ConfigError(f"--checkpoint={one_checkpoint()} has no support: evaluate it first")
    tokenizer = lens.model.tokenizer
    reader = claim_reader(lens.calibration.claims, tokenizer, lens.spec.gap)
    documents = open_corpus(CorpusConfig(kind=_CORPUS.value)).documents("validation")
    texts = [
        " ".join(document.text.split()[: _WORDS.value])
        for document in itertools.islice(documents, _DOCUMENTS.value)
    ]
    rows = lens.explain(texts)
    reasons = [" ".join(row.warnings_of(row.best)) for row in rows]
    claims, right = np.zeros((2, len(rows)))
    for number, row in enumerate(rows):
        likeliest = {prediction.token for prediction in row.before}
        for claim in reader.of(before_end(row.best.tokens, lens.spec.end)):
            if claim.kind == NEXT:
                claims[number] += 1
                right[number] += tokenizer.token(claim.says) in likeliest
    masks = {"no warning": np.array([not reason for reason in reasons])}
    masks |= {"any warning": ~masks["no warning"]}
    for name, words in _REASONS.items():
        masks[name] = np.array([words in reason for reason in reasons])
    bootstrap = DocumentBootstrap.draw([row.document for row in rows], 2000, seed=0)
    table = []
    for name, mask in masks.items():
        per_row = {"claims": claims * mask, "right": right * mask}
        found = bootstrap.interval(ratio_of("right", "claims"), per_row)
        shown = f"{found.value:.2f} [{found.lo:.2f}, {found.hi:.2f}]"
        table.append([name, str(mask.sum()), f"{per_row['claims'].sum():.0f}", shown])
    header = ["rows with", "rows", "next words", "right"]
    Console(sys.stdout).table(
        f"{_CORPUS.value}: {len(rows)} rows of {len(texts)} documents", header, table
    )


if __name__ == "__main__":
    cli.run(main, one_process=True)
