"""Explained tokens as a collection: tables, JSON, a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conlens_jax.files.paths import local_path
from conlens_jax.files.whole import write_whole
from conlens_jax.inspection import plots
from conlens_jax.inspection.page import fragment, whole_page
from conlens_jax.inspection.readings import ExplainedToken, Prediction, Reading
from conlens_jax.models.written import Written

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SCHEMA = 1
"""Version of the JSON that :meth:`Explanations.to_json` writes."""


@dataclasses.dataclass(frozen=True)
class Explanations(Sequence[ExplainedToken]):
    """Explained tokens, in the order of the texts.

    Attributes:
      rows: the explained tokens.
      documents: all tokens of every text, printable, explained or not.
      facts: what was explained and how: model, layer, decoding.
    """

    rows: tuple[ExplainedToken, ...]
    documents: tuple[tuple[str, ...], ...]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def records(self, words: bool = False) -> list[dict[str, Any]]:
        """One flat record per reading or, with ``words``, per word of the readings whose words are
        known (greedy texts)."""
        if words:
            return self._word_records()
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
                "support": None if reading.support is None else list(reading.support),
                "kl_mean": row.kl_mean,
                "warnings": list(row.warnings_of(reading)),
            }
            for row in self.rows
            for sample, reading in enumerate(row.readings)
        ]

    def _word_records(self) -> list[dict[str, Any]]:
        return [
            {
                "document": row.document,
                "position": row.position,
                "token": row.token,
                "sample": sample,
                "number": number,
                "word": word.text,
                "support": word.support,
                "probability": word.probability,
                "cos": reading.cos,
                "kl": reading.kl,
                "warnings": list(row.warnings_of(reading)),
            }
            for row in self.rows
            for sample, reading in enumerate(row.readings)
            for number, word in enumerate(reading.words or ())
        ]

    def to_pandas(self, *, words: bool = False) -> pandas.DataFrame:
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
        return pandas.DataFrame(self.records(words))

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON text, also written to ``path`` if given."""
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
            raise ValueError(f"not the JSON of Explanations.to_json: {error!r}") from error

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained HTML page, also written to ``path`` if given."""
        page = whole_page(self.rows, self.documents, self.facts)
        if path is not None:
            write_whole(local_path(path), page)
        return page

    def plot(self) -> Figure:
        """KL and support by token, through matplotlib; a notebook shows the figure.

        Raises:
          ImportError, ValueError: see :func:`conlens_jax.inspection.plots.plot`.
        """
        return plots.plot(self.rows)

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return fragment(self.rows, self.documents, self.facts)


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
            dataclasses.replace(
                Reading.of(_text(r), float(r["cos"]), float(r["kl"]), predictions(r["after"])),
                pieces=None if r.get("pieces") is None else tuple(map(str, r["pieces"])),
                support=None if r.get("support") is None else tuple(r["support"]),
                warnings=tuple(map(str, r.get("warnings", ()))),
                probabilities=None
                if r.get("probabilities") is None
                else tuple(map(float, r["probabilities"])),
            )
            for r in values["readings"]
        ),
        None if values.get("kl_mean") is None else float(values["kl_mean"]),
        tuple(map(str, values.get("warnings", ()))),
        None if values.get("norm") is None else float(values["norm"]),
    )


def _text(reading: Mapping[str, Any]) -> str:
    text, tokens = str(reading["text"]), reading.get("tokens")
    return text if tokens is None else Written(text, tokens, reading["reads_back"])
