"""The common interface of all corpora.

A corpus is an ordered list of documents. The index of a document never changes, so every run can
resume at document 1,234, and the split depends on the index alone. Only a copy of an earlier text
is left out if the earlier one is in the other split (:mod:`~conlens_jax.corpora.duplicates`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from conlens_jax.config import MODEL_TEXT_FIELDS, CorpusConfig
from conlens_jax.corpora.duplicates import SeenTexts, Tally

SPLITS = ("train", "validation")


class CorpusError(ValueError):
    """The corpus cannot be read; the message names the config field or the file."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
      index: position in the corpus, from 0. Empty texts have an index but are never yielded.
      text: the text itself.
      attributes: values that the generator chose for the text; empty for real text.
      nats: −ln probability of all choices in the text; None for real text.
      given: the beginning of the text if it determines all attributes, such as the task of a sum;
        empty if each attribute is known only after the text has mentioned it.
    """

    index: int
    text: str
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    nats: float | None = None
    given: str = ""


class Corpus(Protocol):
    """Documents in a fixed order, divided into ``"train"`` and ``"validation"``.

    Attributes:
      name: its name in reports.
      notes: messages for the user before it is read, one line each.
    """

    name: str
    notes: tuple[str, ...]

    def description(self) -> dict[str, Any]:
        """Plain values that identify the text, for the metadata of a cache."""
        ...

    def documents(
        self, split: str, start: int = 0, tally: Tally | None = None
    ) -> Iterator[Document]:
        """The documents of a split with ``index >= start``, by ascending index.

        No text of a split has a copy in the other one. Documents before ``start`` are read too if
        that is needed to find copies.

        Args:
          tally: updated while documents are read.

        Raises:
          CorpusError: the split is unknown or empty.
        """
        ...


def is_held_out(seed: int, index: int, fraction: float) -> bool:
    """Whether document ``index`` belongs to validation.

    It depends on a hash of the index, not on a random stream, and so not on the documents before.
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
    """The documents of a split with ``index >= start``; the hash of the index determines the split.

    Args:
      documents: all documents, from index 0.
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

    A field that was added later is included only if it is not at its default, so that older caches
    and embedded models keep their names. What a model writes is described by its reader.
    """
    values = dataclasses.asdict(config)
    for name in MODEL_TEXT_FIELDS:
        del values[name]
    if config.encoding_errors == "error":
        del values["encoding_errors"]
    return values


@dataclasses.dataclass(frozen=True)
class IndexedCorpus:
    """A corpus based on a reader of ``(index, text)`` pairs.

    Attributes:
      name: its name in reports.
      config: the section ``corpus`` of the configuration.
      read: ``read(split, start)`` yields ``(index, text)`` with ``index >= start``, ascending.
        It ignores ``split`` unless ``has_own_validation``.
      details: facts about the source that are not in the configuration.
      has_own_validation: the source has its own validation split, so no document is held out.
        Texts that are also in validation are left out of training, which reads all of validation.
      notes: messages for the user before it is read, one line each.
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
        """See :class:`Corpus`; ``corpus.n_documents`` limits both splits together, or each split if
        the source has its own validation split."""
        check_split(split)
        return self._documents(split, start, Tally() if tally is None else tally)

    def _documents(self, split: str, start: int, tally: Tally) -> Iterator[Document]:
        if self.has_own_validation:
            documents = self._of_own_split(split, start, tally)
        else:
            documents = without_copies(self._texts(split, 0), self.config, split, start, tally)
        yield from not_empty(documents, start, lambda: self._nothing_message(split, tally))

    def _texts(self, split: str, start: int) -> Iterator[Document]:
        limit = self.config.n_documents
        for index, text in self.read(split, start):
            if limit and index >= limit:
                break
            # strip() would copy a long text.
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
        return f"corpus {self.name} is empty: corpus.path={self.config.path!r} contains no text"


def not_empty(
    documents: Iterable[Document], start: int, message: Callable[[], str]
) -> Iterator[Document]:
    """The documents; raises CorpusError if there are none although all were read (``start`` 0)."""
    nothing = True
    for document in documents:
        nothing = False
        yield document
    if start == 0 and nothing:
        raise CorpusError(message())


def nothing_in_split(config: CorpusConfig, what: str, split: str, tally: Tally) -> str:
    """The message for an empty split of a corpus that has documents."""
    copies = f" ({tally.left_out} are copies of texts in the other split)" if tally.left_out else ""
    if config.validation_split:
        fix = f"corpus.validation_split={config.validation_split!r} must contain other texts"
    else:
        fix = (
            f"change corpus.validation_fraction={config.validation_fraction} or corpus.seed, or "
            "give more documents (corpus.n_documents)"
        )
    return f"none of the {tally.read} {what} is in the {split} split{copies}: {fix}"
