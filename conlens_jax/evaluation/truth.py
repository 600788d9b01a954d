"""Truth on the stories: does the text state what the activation holds, and is what it states right?

Of the attributes that the context has mentioned, a linear probe on the activation says which ones
can be read from it. *Recall* is the share of these that the text states; *precision* the share of
the values that the text states which are the story's own. Neither looks at a reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from conlens_jax.data.rows import Rows
from conlens_jax.evaluation.bootstrap import Interval, Statistic
from conlens_jax.evaluation.probe import probe_values
from conlens_jax.evaluation.statistics import ratio_of
from conlens_jax.evaluation.story_facts import StoryFacts
from conlens_jax.evaluation.suite import PerRow, Suite

DISTANCES = ((0, 3), (4, 7), (8, 15), (16, 31), (32, 1_000_000))


def distance_name(low: int, high: int) -> str:
    return f"{low}_{high}" if high < DISTANCES[-1][1] else f"{low}_up"


def readable_attributes(
    train: Rows, train_facts: StoryFacts, rows: Rows, facts: StoryFacts
) -> np.ndarray:
    """Which attributes of each row a linear probe reads right from its activation, [N, A]; only
    those that the context has mentioned."""
    read_NA = np.zeros(facts.truth_NA.shape, bool)
    for index, values_K in enumerate(facts.values.values()):
        labels_N = np.where(
            train_facts.mentioned_NA[:, index], train_facts.truth_NA[:, index], -1
        ).astype(values_K.dtype)
        read_N = probe_values(train.activations_ND, labels_N, values_K, rows.activations_ND)
        read_NA[:, index] = read_N == facts.truth_NA[:, index]
    return read_NA & facts.mentioned_NA


def truth_of_texts(
    suite: Suite, facts: StoryFacts, readable_NA: np.ndarray, texts: Mapping[str, np.ndarray]
) -> dict[str, Interval]:
    """Recall and precision of several texts of the same rows.

    Args:
      readable_NA: of :func:`readable_attributes`.
      texts: prefix of the metrics' names → token ids [N, T]. The one without a prefix, the lens's
        own, is also looked at by attribute and by distance from the last mention.
    """
    per_row: PerRow = {}
    statistics: dict[str, Statistic] = {}

    def share(name: str, part_NA: np.ndarray, whole_NA: np.ndarray) -> None:
        if not whole_NA.any():
            return
        per_row[f"{name}.part"] = part_NA.sum(axis=1)
        per_row[f"{name}.whole"] = whole_NA.sum(axis=1)
        statistics[name] = ratio_of(f"{name}.part", f"{name}.whole")

    mentioned_NA = facts.mentioned_NA
    share("probe_read", readable_NA, mentioned_NA)
    for prefix, texts_NT in texts.items():
        stated_NA = facts.stated_NA(texts_NT) & readable_NA
        claims_NA, right_NA = facts.claims_NA(texts_NT)
        share(f"{prefix}recall", stated_NA, readable_NA)
        share(f"{prefix}precision", right_NA, claims_NA)
        if prefix:
            continue
        for index, name in enumerate(facts.values):
            one = slice(index, index + 1)
            share(f"probe_read_{name}", readable_NA[:, one], mentioned_NA[:, one])
            share(f"recall_{name}", stated_NA[:, one], readable_NA[:, one])
            share(f"precision_{name}", right_NA[:, one], claims_NA[:, one])
        for low, high in DISTANCES:
            near_NA = (facts.distance_NA >= low) & (facts.distance_NA <= high)
            key = f"distance_{distance_name(low, high)}"
            share(f"probe_read_{key}", readable_NA & near_NA, mentioned_NA & near_NA)
            share(f"recall_{key}", stated_NA & near_NA, readable_NA & near_NA)
    return suite.intervals(statistics, per_row)
