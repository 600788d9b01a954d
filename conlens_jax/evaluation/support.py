"""Support: the calibrated probability that a claim of an explanation is right.

The raw score of a claim is the decoder's probability of its tokens. The evaluation fits, for each
kind of claim, how often claims of a score are right
(:mod:`~conlens_jax.evaluation.studies.support`). With sampled texts the share of them that state a
claim counts too (:mod:`~conlens_jax.evaluation.studies.agreement`). A run keeps both in
``support.json``, a saved lens in its ``config.json``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conlens_jax.evaluation.claims import Claim, ClaimReader
from conlens_jax.files.whole import write_whole
from conlens_jax.measurement.metric_files import MEASURED_STEP

SUPPORT_FILE = "support.json"
FORMAT = 1
LEAST_SHARE = 0.25
"""Claims that fewer of the samples state are not shown: they are many, and few are right."""
Knots = Mapping[str, Sequence[tuple[float, float]]]
"""Kind of claim → (score, support) pairs, both ascending; linear in between, constant beyond."""


class SampleKnots(NamedTuple):
    """How often claims are right, by kind and by what K samples say.

    Attributes:
      stated: of claims of the greedy text, by the mean of their support by probability and the
        share of the samples that state them.
      others: of claims that it does not state, by that share.
    """

    stated: Knots
    others: Knots


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How often claims are right, by kind and score.

    Attributes:
      claims: which claims (:meth:`~conlens_jax.evaluation.claims.ClaimReader.to_json`).
      knots: by the decoder's probability, of claims of the greedy text.
      agreement: number of samples → what they add. Empty in files of earlier versions.
      said: kind → claim (:attr:`~conlens_jax.evaluation.claims.Claim.says`) → how many of the
        held-out rows' greedy texts state it.
      said_rows: the number of these rows; 0 in files of earlier versions.
      measured: where it was fitted and tested, and its reliability on the claims of the test half.
    """

    claims: Mapping[str, Any]
    knots: Knots
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    agreement: Mapping[int, SampleKnots] = dataclasses.field(default_factory=dict)
    said: Mapping[str, Mapping[Hashable, int]] = dataclasses.field(default_factory=dict)
    said_rows: int = 0

    def support(self, kind: str, score: float) -> float | None:
        """None for a kind of which there were no claims."""
        return _interpolated(self.knots, kind, score)

    def with_samples(
        self, kind: str, support: float | None, share: float, samples: int
    ) -> float | None:
        """The support of a claim that this share of the samples states.

        Args:
          support: of a claim of the greedy text, by its probability; None: it does not state it.
          samples: their number. If it is none of :attr:`agreement`, only ``support`` is known.
        """
        if samples not in self.agreement:
            return support
        if support is None:
            return _interpolated(self.agreement[samples].others, kind, share)
        return _interpolated(self.agreement[samples].stated, kind, (support + share) / 2)

    def rate(self, kind: str, says: Hashable) -> float | None:
        """The share of the held-out rows whose greedy text states a claim; that of a single row if
        none does. None if it was not counted."""
        if not self.said_rows:
            return None
        return max(self.said.get(kind, {}).get(says, 0), 1) / self.said_rows

    def of_tokens(
        self, reader: ClaimReader, tokens: Sequence[int], log_probs_T: np.ndarray
    ) -> list[float | None]:
        """The support of the claim that each token of a text belongs to; None: it belongs to none.

        Args:
          tokens: the text without its end.
          log_probs_T: the decoder's log-probability of at least these tokens.
        """
        supports: list[float | None] = [None] * len(tokens)
        for claim in reader.of(tokens):
            support = self.support(claim.kind, score_of(claim, log_probs_T))
            for place in claim.places:
                supports[place] = support
        return supports

    def with_facts(self, facts: Mapping[str, Any]) -> Calibration:
        """The same with more in ``measured``."""
        return dataclasses.replace(self, measured={**self.measured, **facts})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": FORMAT,
            "claims": self.claims,
            "knots": _listed(self.knots),
            "agreement": {
                str(k): {name: _listed(knots) for name, knots in of._asdict().items()}
                for k, of in self.agreement.items()
            },
            "said": {kind: list(map(list, of.items())) for kind, of in self.said.items()},
            "said_rows": self.said_rows,
            "measured": self.measured,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: Path) -> Calibration:
        """The inverse of :meth:`to_json`.

        Raises:
          ValueError: the values, of the file ``source``, are something else.
        """
        try:
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r} is not {FORMAT}")
            said = {
                str(kind): {_hashable(says): int(count) for says, count in pairs}
                for kind, pairs in values.get("said", {}).items()
            }
            return cls(
                dict(values["claims"]),
                _knots(values["knots"]),
                dict(values["measured"]),
                {
                    int(k): SampleKnots(_knots(of["stated"]), _knots(of["others"]))
                    for k, of in values.get("agreement", {}).items()
                },
                said,
                int(values.get("said_rows", 0)),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source} has no calibration of claims: {error!r}") from error

    def write(self, folder: Path) -> None:
        """Writes ``support.json``."""
        write_whole(folder / SUPPORT_FILE, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Calibration | None:
        """That of a run folder; None if it has none.

        Raises:
          ValueError: ``support.json`` is something else.
        """
        file = folder / SUPPORT_FILE
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}; evaluate the run again") from error
        return cls.from_json(values, file)

    @classmethod
    def of_step(cls, folder: Path, step: int) -> Calibration | None:
        """That of a run folder if it belongs to the checkpoint of this step."""
        found = cls.read(folder)
        return found if found is not None and found.measured[MEASURED_STEP] == step else None


def score_of(claim: Claim, log_probs_T: np.ndarray) -> float:
    """The decoder's probability of the claim's tokens, each given the tokens before it."""
    return float(np.exp(np.sum(log_probs_T[list(claim.places)], dtype=np.float64)))


def _interpolated(knots: Knots, kind: str, score: float) -> float | None:
    if kind not in knots:
        return None
    scores, supports = zip(*knots[kind], strict=True)
    return float(np.interp(score, scores, supports))


def _listed(knots: Knots) -> dict[str, list[list[float]]]:
    return {kind: [list(pair) for pair in pairs] for kind, pairs in knots.items()}


def _knots(values: Mapping[str, Any]) -> Knots:
    knots = {
        str(kind): tuple((float(score), float(support)) for score, support in pairs)
        for kind, pairs in values.items()
    }
    if not all(knots.values()):
        raise ValueError("a kind of claim has no knots")
    return knots


def _hashable(says: Any) -> Hashable:
    """A claim that is a tuple, (variable, value) of a fact, is a list in JSON."""
    return tuple(says) if isinstance(says, list) else says
