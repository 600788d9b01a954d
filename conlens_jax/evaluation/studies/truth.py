"""Truth where the content of a text is known: does an explanation state what the activation
contains, and is what it states right?

Of the variables whose value the context decides, a linear probe on the activation shows which
ones can be read from it. *Recall* is the share of these that the text states; *precision* the share
of the values that the text states which are right. Neither uses a reconstruction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from conlens_jax.corpora.statements import NOTHING
from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.studies.known_facts import KnownFacts
from conlens_jax.evaluation.studies.probe import probe_values
from conlens_jax.evaluation.suite import PerRow, Suite
from conlens_jax.measurement.aggregates import ratio_of
from conlens_jax.measurement.bootstrap import Interval, Statistic

DISTANCES = ((0, 3), (4, 7), (8, 15), (16, 31), (32, 1_000_000))
"""Tokens from the last statement to P."""
AHEAD = ((1, 3), (4, 7), (8, 15), (16, 1_000_000))
"""Tokens from P to the first statement, where the context decides the value without stating it."""
SOON = 7
"""Values that are first stated up to so many tokens after P are also reported, by variable."""
COMPARED = ("", "null_shuffle_", "text_only_", "window_")
"""Texts (prefixes of their metrics) that are also reported by variable and by distance."""


def range_names(kind: str, ranges: tuple[tuple[int, int], ...]) -> dict[str, tuple[int, int]]:
    """``distance_4_7`` or ``ahead_16_up`` → its ends."""
    last = ranges[-1][1]
    return {f"{kind}_{low}_{'up' if high == last else high}": (low, high) for low, high in ranges}


RANGES = {**range_names("distance", DISTANCES), **range_names("ahead", AHEAD)}


@dataclasses.dataclass(frozen=True)
class Readable:
    """Which variables of each row are read right, [N, A]; only those that the context decides.

    Attributes:
      own_NA: by a linear probe on the lens's own activation.
      prior_NA: without the activation, by guessing the most frequent value of the training rows.
      layers: by a probe on M's activation at other layers, the same rows and place.
    """

    own_NA: np.ndarray
    prior_NA: np.ndarray
    layers: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(
        train: Rows,
        train_facts: KnownFacts,
        rows: Rows,
        facts: KnownFacts,
        layers: Mapping[int, tuple[np.ndarray, np.ndarray]],
    ) -> Readable:
        """Fits the probes on the training rows.

        Args:
          layers: layer → its activations of the training rows and of the rows.
        """
        own = (train.activations_ND, rows.activations_ND)
        return Readable(
            readable_variables(*own, train_facts, facts),
            _guessed(train_facts, facts),
            {
                layer: readable_variables(*both, train_facts, facts)
                for layer, both in layers.items()
            },
        )


def readable_variables(
    train_ND: np.ndarray, x_ND: np.ndarray, train_facts: KnownFacts, facts: KnownFacts
) -> np.ndarray:
    """Which variables of each row linear probes read right from its activation, [N, A].

    Each variable has its own probe where it has been stated, and another for each range of
    :data:`AHEAD` where it has not: M represents a value that it is about to write differently
    from one that it has yet to work out.
    """
    read_NA = np.zeros(facts.truth_NA.shape, bool)
    for index, variable in enumerate(facts.variables.values()):
        train_parts, parts = _probed_parts(train_facts, index), _probed_parts(facts, index)
        for train_N, here_N in zip(train_parts, parts, strict=True):
            if not here_N.any():
                continue
            labels_N = np.where(train_N, train_facts.truth_NA[:, index], NOTHING)
            found_N = probe_values(train_ND, labels_N, variable.values_K, x_ND[here_N])
            read_NA[here_N, index] = found_N == facts.truth_NA[here_N, index]
    return read_NA & facts.known_NA


def _probed_parts(facts: KnownFacts, index: int) -> list[np.ndarray]:
    """Rows by where the variable is stated, [N] each: up to P, and by range ahead of it or nowhere
    in the context."""
    known_N, ahead_N = facts.known_NA[:, index], facts.ahead_NA[:, index]
    parts = [known_N & (ahead_N >= low) & (ahead_N <= high) for low, high in AHEAD]
    stated_N = known_N & facts.mentioned_NA[:, index]
    return [stated_N, *parts, known_N & ~stated_N & (ahead_N == NOTHING)]


def _guessed(train_facts: KnownFacts, facts: KnownFacts) -> np.ndarray:
    guessed_NA = np.zeros(facts.truth_NA.shape, bool)
    for index, variable in enumerate(facts.variables.values()):
        labels_N = np.where(train_facts.known_NA, train_facts.truth_NA, NOTHING)[:, index]
        counts_K = (labels_N[:, None] == variable.values_K).sum(axis=0)
        guess = variable.values_K[np.argmax(counts_K)]
        guessed_NA[:, index] = facts.truth_NA[:, index] == guess
    return guessed_NA & facts.known_NA


def truth_of_texts(
    suite: Suite, facts: KnownFacts, readable: Readable, texts: Mapping[str, np.ndarray]
) -> dict[str, Interval]:
    """Recall and precision of several texts of the same rows.

    Args:
      texts: prefix of the metrics' names → token ids [N, T]. Those of :data:`COMPARED` are also
        reported by variable, by distance, and by variable where it is stated :data:`SOON`.
    """
    shares = _Shares()
    known_NA, own_NA = facts.known_NA, readable.own_NA
    parts = _parts(facts)
    for key, part_NA in {"": True, **parts}.items():
        shares.add(f"probe_read{key}", own_NA & part_NA, known_NA & part_NA)
        shares.add(f"prior_read{key}", readable.prior_NA & part_NA, known_NA & part_NA)
        for layer, layer_NA in readable.layers.items():
            shares.add(f"probe_read_layer_{layer}{key}", layer_NA & part_NA, known_NA & part_NA)
    for prefix, texts_NT in texts.items():
        stated_NA = facts.stated_NA(texts_NT)
        claims_NA, right_NA = facts.claims_NA(texts_NT)
        shares.add(f"{prefix}recall", stated_NA & own_NA, own_NA)
        shares.add(f"{prefix}precision", right_NA, claims_NA)
        for layer, layer_NA in readable.layers.items() if prefix in COMPARED else ():
            shares.add(f"{prefix}recall_layer_{layer}", stated_NA & layer_NA, layer_NA)
            beyond_NA = own_NA & ~layer_NA
            shares.add(f"{prefix}recall_beyond_layer_{layer}", stated_NA & beyond_NA, beyond_NA)
        for key, part_NA in parts.items() if prefix in COMPARED else ():
            shares.add(f"{prefix}recall{key}", stated_NA & own_NA & part_NA, own_NA & part_NA)
            shares.add(f"{prefix}precision{key}", right_NA * part_NA, claims_NA * part_NA)
    return suite.intervals(shares.statistics, shares.per_row)


def _parts(facts: KnownFacts) -> dict[str, np.ndarray]:
    """``_`` and the name of a variable or of a range of tokens → which facts it contains, broadcast
    to [N, A]; ``_NAME_soon`` is a variable where the context decides it and states it soon."""
    columns = np.eye(len(facts.variables), dtype=bool)
    parts = {f"_{name}": columns[i][None] for i, name in enumerate(facts.variables)}
    for name, (low, high) in RANGES.items():
        tokens_NA = facts.distance_NA if name.startswith("distance") else facts.ahead_NA
        parts[f"_{name}"] = facts.known_NA & (tokens_NA >= low) & (tokens_NA <= high)
    soon_NA = facts.known_NA & (facts.ahead_NA >= 1) & (facts.ahead_NA <= SOON)
    return parts | {f"_{name}_soon": soon_NA & parts[f"_{name}"] for name in facts.variables}


@dataclasses.dataclass
class _Shares:
    """Shares of facts, as ratios of sums over rows."""

    per_row: PerRow = dataclasses.field(default_factory=dict)
    statistics: dict[str, Statistic] = dataclasses.field(default_factory=dict)

    def add(self, name: str, part_NA: np.ndarray, whole_NA: np.ndarray) -> None:
        """Nothing where the whole is empty."""
        if not np.any(whole_NA):
            return
        self.per_row[f"{name}.part"] = part_NA.sum(axis=1)
        self.per_row[f"{name}.whole"] = whole_NA.sum(axis=1)
        self.statistics[name] = ratio_of(f"{name}.part", f"{name}.whole")
