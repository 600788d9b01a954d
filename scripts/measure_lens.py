"""Measures a saved lens on the held-out rows of any corpus, such as a kind of text it never saw.

Command:  python scripts/measure_lens.py --checkpoint=smollm2-135m \\
              --config=configs/smollm2_words.py --config.corpus.kind=stdlib \\
              --config.dump.cache_dir=cache/python --out=python.json
Time:     on 2 CPU cores about 4 minutes for 512 rows of SmolLM2-135M, and half a minute for each of
          ``evaluate.claim_samples``.

The config gives the corpus, the rows and the kind of target; model and lens are the saved ones. The
metrics are those of ``python -m conlens_jax.evaluate``; the training rows only give the mean
activation that they are relative to.

The support that the lens gives its claims is tested on these rows. ``--fit_support=folder`` fits it
on one half of their documents instead, tests it on the other, and saves the lens with it and with
these metrics.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import flags

import conlens_jax
from conlens_jax import cli
from conlens_jax.checkpoint_flags import one_checkpoint
from conlens_jax.data.extract import dump_activations
from conlens_jax.evaluation.studies.baselines import linear_lenses
from conlens_jax.evaluation.studies.claims import claim_truth
from conlens_jax.evaluation.studies.interventions import intervene_on_next_words
from conlens_jax.evaluation.studies.measured_claims import measured_claims
from conlens_jax.evaluation.studies.said_words import SaidWords
from conlens_jax.evaluation.suite import Evaluated, Suite, attribute_token_ids
from conlens_jax.files.whole import write_whole
from conlens_jax.measurement.bootstrap import Interval
from conlens_jax.measurement.metric_files import MEASURED_STEP, with_ends
from conlens_jax.models.written import before_end
from conlens_jax.training.session import Session, open_session, training_rows

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string("out", "", "JSON file for the metrics, with the names of metrics.json.")
_FIT_SUPPORT = flags.DEFINE_string(
    "fit_support", "", "New folder for the lens with the support that is fitted here."
)
_DTYPE = flags.DEFINE_string(
    "dtype", None, "Of the trained parts in that folder; by default that of the model."
)
_LINEAR_LENSES = flags.DEFINE_integer(
    "linear_lenses", 0, "Training rows to fit a tuned lens on, for comparison; 0: none."
)
_EXAMPLES = flags.DEFINE_integer("examples", 0, "Rows to print, at equal distances.")


def main() -> None:
    config = cli.load_config(_CONFIG)
    session = open_session(config, cli.start(config))
    dump_activations(config, session.model, session.spec, session.mesh, session.console)
    lens = conlens_jax.Lens.load(one_checkpoint())
    if lens.spec.lens.text_len != session.spec.text_len or lens.spec.layer != session.spec.layer:
        raise SystemExit("--config: model.layer and lens.text_len must be those of the lens")
    held_out = session.held_out
    count = min(config.evaluate.rows or len(held_out), len(held_out))
    suite = Suite.make(
        session.measurer(),
        held_out.rows(np.arange(count)),
        session.reference,
        config.warm,
        attribute_token_ids(config.corpus.kind, session.model.tokenizer),
        n_resamples=config.evaluate.bootstrap,
        seed=config.evaluate.seed,
    )
    evaluated = suite.evaluate(lens.trainable, lens.frozen)
    rows = f"{count} held-out rows of {len(np.unique(suite.rows.documents_N))} documents"
    lens, of_claims = _with_claims(lens, session, suite, evaluated, rows)
    found = {**evaluated.metrics, **of_claims}
    if _LINEAR_LENSES.value:
        train = training_rows(session.caches[0], _LINEAR_LENSES.value)
        found |= linear_lenses(suite, evaluated, lens.frozen["original"], train)
    session.console.table(
        rows,
        ["metric", "value, 95 % interval"],
        [[name, f"{v.value:.3f} [{v.lo:.3f}, {v.hi:.3f}]"] for name, v in found.items()],
    )
    if _OUT.value:
        write_whole(Path(_OUT.value), json.dumps(with_ends(found), indent=1) + "\n")
    if _FIT_SUPPORT.value:
        fitted = dataclasses.replace(lens, metrics=with_ends(found))
        fitted.save(_FIT_SUPPORT.value, dtype=_DTYPE.value)
    _print_examples(session, suite, evaluated, _EXAMPLES.value)


def _with_claims(
    lens: conlens_jax.Lens, session: Session, suite: Suite, evaluated: Evaluated, rows: str
) -> tuple[conlens_jax.Lens, Mapping[str, Interval]]:
    """The lens, with a new calibration of its claims if one is to be fitted; and their metrics."""
    config, tokenizer = session.config, session.model.tokenizer
    truth = claim_truth(config, suite, tokenizer)
    if truth is None:
        return lens, {}
    calibration, found, _ = measured_claims(
        *(suite, truth, evaluated, lens.trainable, lens.frozen),
        known=None if _FIT_SUPPORT.value else lens.calibration,
        samples=config.evaluate.claim_samples,
    )
    if isinstance(truth, SaidWords):
        found = {**found, **truth.truth(evaluated)}
        found |= intervene_on_next_words(
            suite, evaluated, lens.trainable, lens.frozen, truth.reader, config.evaluate.seed
        )
    if _FIT_SUPPORT.value and calibration is not None:
        measured_on = {MEASURED_STEP: lens.facts.get("step"), "rows": rows}
        lens = dataclasses.replace(lens, calibration=calibration.with_facts(measured_on))
    return lens, found


def _print_examples(session: Session, suite: Suite, evaluated: Evaluated, number: int) -> None:
    tokenizer, rows = session.model.tokenizer, suite.rows
    shown = lambda tokens: repr(tokenizer.decode(before_end(tokens, session.spec.end)))
    for row in np.linspace(0, len(rows) - 1, number).astype(int):
        position = int(rows.positions_N[row])
        context = rows.tokens_NS[row, max(0, position - 20) : position + 1]
        print(repr(tokenizer.decode(context.tolist())))
        print("   says  ", shown(evaluated.explained.texts["greedy"][row]))
        print("   target", shown(suite.targets_NT[row]))


if __name__ == "__main__":
    cli.run(main)
