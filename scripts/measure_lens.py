"""Measures a saved lens on the held-out rows of any corpus, such as a kind of text it never saw.

Command:  python scripts/measure_lens.py --checkpoint=smollm2-135m \\
              --config=configs/smollm2_words.py --config.corpus.kind=stdlib \\
              --config.dump.cache_dir=cache/python --out=python.json
Time:     on 2 CPU cores about 4 minutes for 512 rows of SmolLM2-135M.

The config gives the corpus, the rows and the kind of target; model and lens are the saved ones. The
metrics are those of ``python -m conlens_jax.evaluate``; the training rows only give the mean
activation that they are relative to.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from absl import flags

import conlens_jax
from conlens_jax import cli
from conlens_jax.checkpoint_flags import CHECKPOINT
from conlens_jax.data.extract import dump_activations
from conlens_jax.data.targets.opening import mark_ids
from conlens_jax.evaluation.studies.said_words import SaidWords
from conlens_jax.evaluation.suite import Suite, attribute_token_ids
from conlens_jax.models.written import before_end
from conlens_jax.training.session import open_session

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string(
    "out", "", "JSON file for the metrics: name to value, low end and high end."
)
_EXAMPLES = flags.DEFINE_integer("examples", 0, "Rows to print, at equal distances.")


def main() -> None:
    config = cli.load_config(_CONFIG)
    session = open_session(config, cli.start(config))
    dump_activations(config, session.model, session.spec, session.mesh, session.console)
    lens = conlens_jax.Lens.load(CHECKPOINT.value)
    if lens.spec.lens.text_len != session.spec.text_len or lens.spec.layer != session.spec.layer:
        raise SystemExit("--config: model.layer and lens.text_len must be those of the lens")
    held_out, tokenizer = session.held_out, session.model.tokenizer
    count = min(config.evaluate.rows or len(held_out), len(held_out))
    suite = Suite.make(
        session.measurer(),
        held_out.rows(np.arange(count)),
        session.reference,
        config.warm,
        attribute_token_ids(config.corpus.kind, tokenizer),
        n_resamples=config.evaluate.bootstrap,
        seed=config.evaluate.seed,
    )
    evaluated = suite.evaluate(lens.trainable, lens.frozen)
    found = evaluated.metrics
    if config.target.kind == "words":
        words = SaidWords(suite, tokenizer, **mark_ids(config.target, tokenizer))
        found = {**found, **words.truth(evaluated)}
    session.console.table(
        f"{count} held-out rows of {len(np.unique(suite.rows.documents_N))} documents",
        ["metric", "value, 95 % interval"],
        [[name, f"{v.value:.3f} [{v.lo:.3f}, {v.hi:.3f}]"] for name, v in found.items()],
    )
    if _OUT.value:
        values = {name: [v.value, v.lo, v.hi] for name, v in found.items()}
        Path(_OUT.value).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    end = session.spec.end
    shown = lambda tokens: repr(tokenizer.decode(before_end(tokens, end)))
    for row in np.linspace(0, count - 1, _EXAMPLES.value).astype(int):
        position = int(suite.rows.positions_N[row])
        context = suite.rows.tokens_NS[row, max(0, position - 20) : position + 1]
        print(repr(tokenizer.decode(context.tolist())))
        print("   says  ", shown(evaluated.explained.texts["greedy"][row]))
        print("   target", shown(suite.targets_NT[row]))


if __name__ == "__main__":
    cli.run(main)
