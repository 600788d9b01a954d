"""What an explanation is: one entry a token, and a collection of them that can be written out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from conlens_jax.config.paths import local_path
from conlens_jax.data.written import Written
from conlens_jax.whole_files import write_whole

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
"""Version of the JSON that :meth:`Explanations.to_json` writes."""


class Prediction(NamedTuple):
    """One entry of M's next-token distribution."""

    token: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """One text that stands for an activation, and what it is worth.

    Attributes:
      text: the explanation; empty where a bare vector was swapped in, or where all of its tokens
        are special ones.
      cos: cosine of the activation and of what the encoder makes of the explanation.
      kl: KL(M ‖ M with the reconstruction swapped in) of the prediction behind the token, nats.
      after: M's most probable next tokens with the swap.
      tokens: the token ids that the numbers are of. None where the text was read by another
        tokenizer than the model's, as an NLA pair reads it, where a bare vector was swapped in,
        and in JSON of earlier versions.
      reads_back: whether the text alone, tokenised again, gives these tokens; None without them.
        Where it does not, hand on the reading itself (``lens.swap(text, position, reading)``)
        and not a copy of its text.
    """

    text: str
    cos: float
    kl: float
    after: tuple[Prediction, ...]
    tokens: tuple[int, ...] | None = None
    reads_back: bool | None = None

    @classmethod
    def of(cls, text: str, cos: float, kl: float, after: tuple[Prediction, ...]) -> Reading:
        """With the tokens that ``text`` brings along, where it does."""
        if isinstance(text, Written):
            return cls(text, cos, kl, after, text.tokens, text.reads_back)
        return cls(text, cos, kl, after)


@dataclasses.dataclass(frozen=True)
class ExplainedToken:
    """What the lens says about one token of a document.

    Attributes:
      document: which of the given texts.
      position: index of the token in it; a bos token counts.
      token: the token, printable.
      before: M's most probable next tokens as it is.
      readings: the explanations, one a sample.
    """

    document: int
    position: int
    token: str
    before: tuple[Prediction, ...]
    readings: tuple[Reading, ...]

    @property
    def best(self) -> Reading:
        """The reading that changes M's prediction least."""
        return min(self.readings, key=lambda reading: reading.kl)

    @property
    def explanation(self) -> str:
        return self.best.text


@dataclasses.dataclass(frozen=True)
class Explanations(Sequence[ExplainedToken]):
    """Explained tokens, in the order of the texts.

    Attributes:
      rows: the explained tokens.
      documents: all tokens of every text, printable, explained or not.
      facts: what was read with what: model, layer, decoding.
    """

    rows: tuple[ExplainedToken, ...]
    documents: tuple[tuple[str, ...], ...]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def records(self) -> list[dict[str, Any]]:
        """One flat record a reading."""
        return [
            {
                "document": row.document,
                "position": row.position,
                "token": row.token,
                "sample": sample,
                "explanation": str(reading.text),
                "cos": reading.cos,
                "kl": reading.kl,
                "before": _listed(row.before),
                "after": _listed(reading.after),
                "tokens": None if reading.tokens is None else list(reading.tokens),
                "reads_back": reading.reads_back,
            }
            for row in self.rows
            for sample, reading in enumerate(row.readings)
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`records` as a table.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Explanations.to_pandas needs pandas: pip install pandas; without it, "
                "Explanations.records() has the same rows as dictionaries"
            ) from error
        return pandas.DataFrame(self.records())

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON text, written to ``path`` where one is given."""
        values = {"schema": SCHEMA, **dataclasses.asdict(self)}
        text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
        if path is not None:
            write_whole(local_path(path), text)
        return text

    @classmethod
    def from_json(cls, text: str) -> Explanations:
        """The inverse of :meth:`to_json`.

        Raises:
          ValueError: the text is something else.
        """
        try:
            values = json.loads(text)
            if values["schema"] != SCHEMA:
                raise ValueError(f"schema {values['schema']!r} is not {SCHEMA}")
            return cls(
                tuple(map(_row, values["rows"])),
                tuple(tuple(map(str, tokens)) for tokens in values["documents"]),
                dict(values["facts"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no JSON of Explanations.to_json: {error!r}") from error

    def to_html(self, path: str | Path | None = None) -> str:
        """A page that needs nothing else to be shown, written to ``path`` where one is given."""
        from conlens_jax.inspection.page import whole_page

        page = whole_page(self)
        if path is not None:
            write_whole(local_path(path), page)
        return page

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        from conlens_jax.inspection.page import fragment

        return fragment(self)


def _listed(predictions: Sequence[Prediction]) -> str:
    return ", ".join(f"{token} {probability:.2f}" for token, probability in predictions)


def _row(values: Mapping[str, Any]) -> ExplainedToken:
    predictions = lambda pairs: tuple(Prediction(str(t), float(p)) for t, p in pairs)
    return ExplainedToken(
        int(values["document"]),
        int(values["position"]),
        str(values["token"]),
        predictions(values["before"]),
        tuple(
            Reading.of(_text(r), float(r["cos"]), float(r["kl"]), predictions(r["after"]))
            for r in values["readings"]
        ),
    )


def _text(reading: Mapping[str, Any]) -> str:
    text, tokens = str(reading["text"]), reading.get("tokens")
    return text if tokens is None else Written(text, tokens, reading["reads_back"])
