"""Where text comes from: one interface over all kinds of corpora.

A corpus is an ordered list of documents. The index of a document never changes, so "go on at
document 1,234" means the same in every run, and the hold-out is a property of the index alone.
Only a copy of an earlier text is left out where the earlier one is on the other side
(:mod:`~conlens_jax.corpora.duplicates`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora.duplicates import SeenTexts, Tally

SPLITS = ("train", "validation")


class CorpusError(ValueError):
    """A corpus that cannot be read; the message names the config field or the file."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
      index: the place in the corpus, from 0. Empty texts keep their index but are never yielded.
      text: the text itself.
      attributes: what the generator decided the text is about; empty for real text.
      nats: −ln probability of all choices that made the text; None for real text.
      given: the beginning of the text that decides all attributes, as the task of a sum does;
        empty where each attribute is known only once the text has mentioned it.
    """

    index: int
    text: str
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    nats: float | None = None
    given: str = ""


class Corpus(Protocol):
    """Documents in a fixed order, divided into ``"train"`` and ``"validation"``.

    Attributes:
      name: what it is called in reports.
      notes: what the user should know of it before it is read, one line each.
    """

    name: str
    notes: tuple[str, ...]

    def description(self) -> dict[str, Any]:
        """Plain values that say which text this is, for the metadata of a cache."""
        ...

    def documents(
        self, split: str, start: int = 0, tally: Tally | None = None
    ) -> Iterator[Document]:
        """The documents of a split with ``index >= start``, by increasing index.

        No text of a split has a copy in the other one. Documents before ``start`` are read too
        where they decide that.

        Args:
          tally: counts what is read, while it is read.

        Raises:
          CorpusError: an unknown split, or nothing to read in it.
        """
        ...


def is_held_out(seed: int, index: int, fraction: float) -> bool:
    """Whether document ``index`` belongs to validation.

    A hash of the index, not a random stream: the answer does not depend on how many documents
    were read before.
    """
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def check_split(split: str) -> None:
    """Raises CorpusError for anything but ``"train"`` and ``"validation"``."""
    if split not in SPLITS:
        raise CorpusError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")


def without_copies(
    documents: Iterable[Document], config: CorpusConfig, split: str, start: int, tally: Tally
) -> Iterator[Document]:
    """The documents of a split with ``index >= start``, by the hash of their index.

    Args:
      documents: all of them, from index 0 on.
    """
    seen, wanted = SeenTexts(), split == "validation"
    for document in documents:
        held_out = is_held_out(config.seed, document.index, config.validation_fraction)
        tally.read += 1
        first = seen.first_side(document.text, held_out)
        if first is not None:
            tally.copies += 1
            if first != held_out:
                tally.left_out += 1
                continue
        if held_out == wanted and document.index >= start:
            yield document


def described(config: CorpusConfig) -> dict[str, Any]:
    """The section ``corpus``, for :meth:`Corpus.description`.

    A field that came later stands in it only where it is not at its default: caches and embedded
    models that were made before it keep their names.
    """
    values = dataclasses.asdict(config)
    if config.encoding_errors == "error":
        del values["encoding_errors"]
    return values


@dataclasses.dataclass(frozen=True)
class IndexedCorpus:
    """A corpus made of a reader of ``(index, text)`` pairs.

    Attributes:
      name: what it is called in reports.
      config: the section ``corpus`` of the configuration.
      read: ``read(split, start)`` gives ``(index, text)`` with ``index >= start``, increasing.
        It ignores ``split`` unless ``has_own_validation``.
      details: facts about the source that the configuration does not hold.
      has_own_validation: the source keeps validation apart, so that no document is held out. What
        is also in validation is then left out of training, for which all of validation is read.
      notes: what the user should know of it before it is read, one line each.
    """

    name: str
    config: CorpusConfig
    read: Callable[[str, int], Iterator[tuple[int, str]]]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has_own_validation: bool = False
    notes: tuple[str, ...] = ()

    def description(self) -> dict[str, Any]:
        """The corpus section of the configuration, and facts about the source."""
        return {**described(self.config), **self.details}

    def documents(
        self, split: str, start: int = 0, tally: Tally | None = None
    ) -> Iterator[Document]:
        """See :class:`Corpus`; ``corpus.n_documents`` counts both splits together, except where
        validation is a split of its own (then it limits each)."""
        check_split(split)
        return self._documents(split, start, Tally() if tally is None else tally)

    def _documents(self, split: str, start: int, tally: Tally) -> Iterator[Document]:
        if self.has_own_validation:
            documents = self._of_own_split(split, start, tally)
        else:
            documents = without_copies(self._texts(split, 0), self.config, split, start, tally)
        nothing = True
        for document in documents:
            nothing = False
            yield document
        if start == 0 and nothing:
            raise CorpusError(self._nothing_message(split, tally))

    def _texts(self, split: str, start: int) -> Iterator[Document]:
        limit = self.config.n_documents
        for index, text in self.read(split, start):
            if limit and index >= limit:
                break
            # Not strip(): it would copy a long text.
            if text and not text.isspace():
                yield Document(index, text)

    def _of_own_split(self, split: str, start: int, tally: Tally) -> Iterator[Document]:
        seen = SeenTexts()
        if split == "train":
            for document in self._texts("validation", 0):
                seen.first_side(document.text, True)
        for document in self._texts(split, start):
            tally.read += 1
            first = seen.first_side(document.text, False)
            tally.copies += first is not None
            tally.left_out += bool(first)
            if not first:
                yield document

    def _nothing_message(self, split: str, tally: Tally) -> str:
        if tally.read:
            return nothing_in_split(self.config, f"documents of corpus {self.name}", split, tally)
        return f"corpus {self.name} is empty: corpus.path={self.config.path!r} holds no text"


def nothing_in_split(config: CorpusConfig, what: str, split: str, tally: Tally) -> str:
    """The message for a split without a document, though there are some in the corpus."""
    copies = f" ({tally.left_out} are copies of texts on the other side)" if tally.left_out else ""
    if config.validation_split:
        fix = f"corpus.validation_split={config.validation_split!r} must hold other texts"
    else:
        fix = (
            f"change corpus.validation_fraction={config.validation_fraction} or corpus.seed, or "
            "give more documents (corpus.n_documents)"
        )
    return f"none of the {tally.read} {what} is in the {split} split{copies}: {fix}"
