"""Where text comes from: one interface over all kinds of corpora.

A corpus is an ordered list of documents. The index of a document never changes, so "go on at
document 1,234" means the same in every run, and the hold-out is a property of the index alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from conlens_jax.config import CorpusConfig

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
    """Documents in a fixed order, divided into ``"train"`` and ``"validation"``."""

    name: str

    def description(self) -> dict[str, Any]:
        """Plain values that say which text this is, for the metadata of a cache."""
        ...

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """The documents of a split with ``index >= start``, by increasing index.

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


@dataclasses.dataclass(frozen=True)
class IndexedCorpus:
    """A corpus made of a reader of ``(index, text)`` pairs.

    Attributes:
      name: what it is called in reports.
      config: the section ``corpus`` of the configuration.
      read: ``read(split, start)`` gives ``(index, text)`` with ``index >= start``, increasing.
        It ignores ``split`` unless ``has_own_validation``.
      details: facts about the source that the configuration does not hold.
      has_own_validation: the source keeps validation apart, so that no document is held out.
    """

    name: str
    config: CorpusConfig
    read: Callable[[str, int], Iterator[tuple[int, str]]]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has_own_validation: bool = False

    def description(self) -> dict[str, Any]:
        """The corpus section of the configuration, and facts about the source."""
        return {**dataclasses.asdict(self.config), **self.details}

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """See :class:`Corpus`; ``corpus.n_documents`` counts both splits together, except where
        validation is a split of its own (then it limits each)."""
        check_split(split)
        return self._documents(split, start)

    def _documents(self, split: str, start: int) -> Iterator[Document]:
        limit, n_read, n_yielded = self.config.n_documents, 0, 0
        for index, text in self.read(split, start):
            if limit and index >= limit:
                break
            if not text.strip():
                continue
            n_read += 1
            if self._belongs(index, split):
                n_yielded += 1
                yield Document(index, text)
        if start == 0 and not n_yielded:
            raise CorpusError(self._nothing_message(split, n_read))

    def _belongs(self, index: int, split: str) -> bool:
        if self.has_own_validation:
            return True
        held_out = is_held_out(self.config.seed, index, self.config.validation_fraction)
        return held_out == (split == "validation")

    def _nothing_message(self, split: str, n_read: int) -> str:
        if n_read:
            return (
                f"none of the {n_read} documents of corpus {self.name} is in the {split} split: "
                f"change corpus.validation_fraction={self.config.validation_fraction} or "
                "corpus.seed, or give more documents"
            )
        return f"corpus {self.name} is empty: corpus.path={self.config.path!r} holds no text"


def open_corpus(config: CorpusConfig) -> Corpus:
    """The corpus that ``config.kind`` names.

    Files and columns are checked here; that there is any text at all, when the reading starts.

    Raises:
      CorpusError: an unknown kind, or a path, column or split that is not there.
    """
    # Imported here because every one of these modules needs the classes above.
    from conlens_jax.data import stdlib_docs, text_files
    from conlens_jax.data.generated import GeneratedCorpus
    from conlens_jax.data.generators import GENERATORS

    openers: dict[str, Callable[[CorpusConfig], Corpus]] = {
        **{
            kind: functools.partial(GeneratedCorpus, generator=generator)
            for kind, generator in GENERATORS.items()
        },
        "stdlib": stdlib_docs.open_stdlib,
        "text": text_files.open_text,
        "jsonl": text_files.open_jsonl,
        "parquet": text_files.open_parquet,
        "huggingface": text_files.open_huggingface,
    }
    if config.kind not in openers:
        raise CorpusError(f"corpus.kind must be one of {', '.join(openers)}, not {config.kind!r}")
    return openers[config.kind](config)
