"""The studies beyond the basic suite: which of them a suite runs, for which lenses, on what."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from conlens_jax.config import GENERATED_CORPORA, ConfigError, EvaluateConfig
from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.corpora.statements import token_variables
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.claims import ClaimReader
from conlens_jax.evaluation.studies.audit import audit_lens
from conlens_jax.evaluation.studies.baselines import baselines, text_only
from conlens_jax.evaluation.studies.best_of import best_of
from conlens_jax.evaluation.studies.interventions import intervene, intervene_on_next_words
from conlens_jax.evaluation.studies.known_facts import KnownFacts
from conlens_jax.evaluation.studies.said_words import SaidWords
from conlens_jax.evaluation.studies.slices import sliced
from conlens_jax.evaluation.studies.text_changes import Lexicon
from conlens_jax.evaluation.studies.truth import Readable, truth_of_texts
from conlens_jax.evaluation.studies.word_parts import WordParts
from conlens_jax.evaluation.suite import Evaluated, Suite
from conlens_jax.measurement.bootstrap import Interval
from conlens_jax.measurement.runner import Measurer
from conlens_jax.models.param_table import Params
from conlens_jax.training.auditor import train_auditor, train_next_words_reader
from conlens_jax.training.session import Session, training_rows

_TRAIN_ROWS = 8_192
"""Rows that linear maps are fitted on."""


@dataclasses.dataclass(frozen=True)
class Studies:
    """The data of the studies, made once for all lenses of a run.

    Attributes:
      untrained: the lens as it is before any training.
      train: training rows, for linear maps.
      facts: what is known of the rows' documents; None where the corpus is not generated.
      readable: which facts can be read from activations; None without a truth study.
      lexicon: what the changes to a text need to know of its tokens.
      claims: finds what explanations in words claim; None for other targets.
      auditor: the audit encoder; None without an audit.
      word_parts, next_words_reader: the parts of explanations in words, and the encoder of M's own
        likeliest next tokens; None without an audit or for other targets.
    """

    config: EvaluateConfig
    suite: Suite
    frozen: Params
    untrained: Params
    train: Rows
    facts: KnownFacts | None
    readable: Readable | None
    lexicon: Lexicon
    claims: ClaimReader | None
    auditor: Params | None
    word_parts: WordParts | None
    next_words_reader: Params | None

    @staticmethod
    def make(
        session: Session, suite: Suite, untrained: Params, frozen: Params, run_folder: Path
    ) -> Studies:
        """Trains the encoders that the suite needs and the run does not have yet.

        Raises:
          ConfigError: interventions on a corpus whose content is not known.
        """
        config, tokenizer = session.config, session.model.tokenizer
        generator = GENERATORS.get(config.corpus.kind)
        if generator is not None and not token_variables(generator.variables, tokenizer):
            generator = None  # no value is a single token of this model's vocabulary
        claims = None
        if config.target.kind == "words":
            claims = SaidWords.of_target(suite, tokenizer, config.target).reader
        if config.evaluate.suite == "interventions" and generator is None and claims is None:
            raise ConfigError(
                "evaluate.suite='interventions' needs words whose meaning is known, which only "
                f"corpus.kind={' or '.join(map(repr, GENERATED_CORPORA))} or target.kind='words' "
                f"have, not {config.corpus.kind!r} with {config.target.kind!r}; use suite='full'"
            )
        train = training_rows(session.caches[0], _TRAIN_ROWS)
        facts, readable, is_full = None, None, config.evaluate.suite == "full"
        if generator is not None:
            facts_of = lambda rows: KnownFacts.of(rows, tokenizer, generator, config.corpus.seed)
            facts = facts_of(suite.rows)
            if is_full:
                layers = _other_layers(session, frozen["original"], train, suite.rows)
                readable = Readable.of(train, facts_of(train), suite.rows, facts, layers)
        parts = WordParts.of(config.target, tokenizer, suite) if is_full else None
        return Studies(
            config=config.evaluate,
            suite=suite,
            frozen=frozen,
            untrained=untrained,
            train=train,
            facts=facts,
            readable=readable,
            lexicon=Lexicon.of(tokenizer, {} if generator is None else generator.synonyms),
            auditor=train_auditor(session, run_folder) if is_full else None,
            claims=claims,
            word_parts=parts,
            next_words_reader=parts
            and train_next_words_reader(session, run_folder, parts.separator),
        )

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of what is known of every document."""
        return () if self.facts is None else tuple(self.facts.variables)

    def of_lens(self, evaluated: Evaluated, trainable: Params) -> dict[str, Interval]:
        """What the suite measures of every lens: the audit, what its text adds to M's output, and
        the truth of its text."""
        if self.auditor is None:
            return {}
        measured = audit_lens(
            self.suite,
            evaluated,
            trainable,
            self.frozen,
            self.auditor,
            self.lexicon,
            self.config.seed,
        )
        if self.word_parts is not None and self.next_words_reader is not None:
            measured |= self.word_parts.audited(
                evaluated, trainable, self.frozen, self.auditor, self.next_words_reader
            )
        if self.facts is not None and self.readable is not None:
            suite, texts = self.suite, evaluated.explained.texts
            measured |= truth_of_texts(
                suite,
                self.facts,
                self.readable,
                {
                    "": texts["greedy"],
                    "sampled_": texts["sampled"],
                    "null_shuffle_": texts["greedy"][suite.partner_N],
                    "text_only_": text_only(suite, self.frozen["original"]),
                    "window_": suite.targets_NT,
                },
            )
        return measured

    def of_main_lens(self, evaluated: Evaluated, trainable: Params) -> dict[str, Interval]:
        """What is measured of the requested checkpoint alone: interventions, best of K, parts of
        the rows; and the baselines, which do not depend on the lens."""
        measured: dict[str, Interval] = {}
        if self.facts is not None:
            measured |= intervene(
                self.suite,
                evaluated,
                trainable,
                self.frozen,
                self.facts.variables,
                self.config.seed,
            )
        if self.claims is not None:
            measured |= intervene_on_next_words(
                self.suite, evaluated, trainable, self.frozen, self.claims, self.config.seed
            )
        if self.auditor is None:
            return measured
        measured |= best_of(self.suite, evaluated, trainable, self.frozen, self.config.best_of)
        measured |= sliced(self.suite, evaluated)
        return measured | baselines(
            self.suite,
            evaluated,
            trainable,
            self.untrained,
            self.frozen,
            self.auditor,
            self.train,
            self.config.seed,
            in_words=self.word_parts is not None,
        )


def _other_layers(
    session: Session, original: Params, train: Rows, rows: Rows
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """M's activations of the training rows and of the rows after its first and its last block,
    except at the lens's own layer."""
    found = {}
    for layer in {0, session.spec.model.n_layers - 1} - {session.spec.layer}:
        spec = dataclasses.replace(session.spec, layer=layer)
        batch_size = session.config.evaluate.batch_size
        measurer = Measurer(spec, session.mesh, horizon=1, batch_size=batch_size, seed=0)
        found[layer] = tuple(
            measurer.with_activations(original, part).activations_ND for part in (train, rows)
        )
    return found
