"""The studies behind the basic suite: which of them a suite has, for which lenses, from what."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from conlens_jax.config import ConfigError, EvaluateConfig
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.audit import audit_lens
from conlens_jax.evaluation.baselines import baselines, text_only
from conlens_jax.evaluation.best_of import best_of
from conlens_jax.evaluation.bootstrap import Interval
from conlens_jax.evaluation.interventions import intervene
from conlens_jax.evaluation.slices import sliced
from conlens_jax.evaluation.story_facts import StoryFacts
from conlens_jax.evaluation.suite import Evaluated, Suite
from conlens_jax.evaluation.text_changes import Lexicon
from conlens_jax.evaluation.truth import readable_attributes, truth_of_texts
from conlens_jax.models.param_table import Params
from conlens_jax.training.auditor import train_auditor
from conlens_jax.training.setting import Setting, training_rows

_TRAIN_ROWS = 8_192
"""Rows that linear maps are fitted on."""


@dataclasses.dataclass(frozen=True)
class Studies:
    """What the studies look at, made once for all lenses of a run.

    Attributes:
      untrained: the lens as it is before any training.
      train: training rows, for linear maps.
      facts, train_facts: what is true of the rows' stories; None for another corpus.
      lexicon: what changes to a text know of its tokens.
      auditor: the audit encoder; None where the suite has no audit.
    """

    config: EvaluateConfig
    suite: Suite
    frozen: Params
    untrained: Params
    train: Rows
    facts: StoryFacts | None
    train_facts: StoryFacts | None
    lexicon: Lexicon
    auditor: Params | None

    @staticmethod
    def make(
        setting: Setting, suite: Suite, untrained: Params, frozen: Params, run_folder: Path
    ) -> Studies:
        """Trains the audit encoder where the suite asks for one that is not there.

        Raises:
          ConfigError: interventions on a corpus whose attributes are not known.
        """
        config, tokenizer = setting.config, setting.model.tokenizer
        is_stories = config.corpus.kind == "stories"
        if config.evaluate.suite == "interventions" and not is_stories:
            raise ConfigError(
                [
                    "evaluate.suite='interventions' needs words whose meaning is known, which only "
                    f"corpus.kind='stories' has, not {config.corpus.kind!r}; use suite='full'"
                ]
            )
        train = training_rows(setting.caches[0], _TRAIN_ROWS)
        facts_of = lambda rows: StoryFacts.of(rows, tokenizer, config.corpus.seed)
        return Studies(
            config=config.evaluate,
            suite=suite,
            frozen=frozen,
            untrained=untrained,
            train=train,
            facts=facts_of(suite.rows) if is_stories else None,
            train_facts=facts_of(train) if is_stories else None,
            lexicon=Lexicon.of(tokenizer, knows_synonyms=is_stories),
            auditor=train_auditor(setting, run_folder) if config.evaluate.suite == "full" else None,
        )

    def of_lens(self, evaluated: Evaluated, trainable: Params) -> dict[str, Interval]:
        """What the suite measures of every lens: the audit, and the truth of its text."""
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
        if self.facts is not None and self.train_facts is not None:
            suite, texts = self.suite, evaluated.explained.texts
            readable_NA = readable_attributes(self.train, self.train_facts, suite.rows, self.facts)
            measured |= truth_of_texts(
                suite,
                self.facts,
                readable_NA,
                {
                    "": texts["greedy"],
                    "sampled_": texts["sampled"],
                    "null_shuffle_": texts["greedy"][suite.partner_N],
                    "text_only_": text_only(suite, self.frozen["original"]),
                    "window_": suite.window(suite.warm.before, suite.warm.after),
                },
            )
        return measured

    def of_main_lens(self, evaluated: Evaluated, trainable: Params) -> dict[str, Interval]:
        """What is measured of the checkpoint itself alone: interventions, best of K, parts of the
        rows; and the baselines, which belong to no lens."""
        measured: dict[str, Interval] = {}
        if self.facts is not None:
            measured |= intervene(
                self.suite,
                evaluated,
                trainable,
                self.frozen,
                self.facts.values,
                self.config.seed,
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
        )
