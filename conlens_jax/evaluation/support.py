"""Support: the calibrated probability that a claim of an explanation is right.

The raw score of a claim is the decoder's probability of its tokens. The evaluation fits, for each
kind of claim, how often claims of a score are right
(:mod:`~conlens_jax.evaluation.studies.support`). A run keeps that in ``support.json``, a
saved lens in its ``config.json``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conlens_jax.evaluation.claims import Claim, ClaimReader
from conlens_jax.files.whole import write_whole
from conlens_jax.measurement.metric_files import MEASURED_STEP

SUPPORT_FILE = "support.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How often claims are right, by kind and score.

    Attributes:
      claims: which claims (:meth:`~conlens_jax.evaluation.claims.ClaimReader.to_json`).
      knots: kind of claim → (score, support) pairs, both ascending; linear in between, constant
        beyond.
      measured: where it was fitted and tested, and its reliability on the claims of the test half.
    """

    claims: Mapping[str, Any]
    knots: Mapping[str, Sequence[tuple[float, float]]]
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def support(self, kind: str, score: float) -> float | None:
        """None for a kind of which there were no claims."""
        if kind not in self.knots:
            return None
        scores, supports = zip(*self.knots[kind], strict=True)
        return float(np.interp(score, scores, supports))

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
        knots = {kind: [list(pair) for pair in pairs] for kind, pairs in self.knots.items()}
        return {"format": FORMAT, "claims": self.claims, "knots": knots, "measured": self.measured}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: Path) -> Calibration:
        """The inverse of :meth:`to_json`.

        Raises:
          ValueError: the values, of the file ``source``, are something else.
        """
        try:
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r} is not {FORMAT}")
            knots = {
                str(kind): tuple((float(score), float(support)) for score, support in pairs)
                for kind, pairs in values["knots"].items()
            }
            if not all(knots.values()):
                raise ValueError("a kind of claim has no knots")
            return cls(dict(values["claims"]), knots, dict(values["measured"]))
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
