"""Opens the corpus of a config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora import huggingface_texts, model_texts, stdlib_docs, text_files
from conlens_jax.corpora.corpus import Corpus, CorpusError
from conlens_jax.corpora.generated import GeneratedCorpus
from conlens_jax.corpora.generators import GENERATORS


def open_corpus(config: CorpusConfig, written: Path | None = None) -> Corpus:
    """The corpus that ``config.kind`` names.

    Files and columns are checked here; whether there is any text, when reading starts.

    Args:
      written: for ``"model"``, the folder with what the model has written
        (:func:`conlens_jax.data.model_documents.open_texts`).

    Raises:
      CorpusError: the kind is unknown, or a path, column or split does not exist.
    """
    openers: dict[str, Callable[[CorpusConfig], Corpus]] = {
        **{
            kind: functools.partial(GeneratedCorpus, generator=generator)
            for kind, generator in GENERATORS.items()
        },
        "stdlib": stdlib_docs.open_stdlib,
        "text": text_files.open_text,
        "jsonl": text_files.open_jsonl,
        "parquet": text_files.open_parquet,
        "huggingface": huggingface_texts.open_huggingface,
        "model": functools.partial(model_texts.open_model_texts, folder=written),
    }
    if config.kind not in openers:
        raise CorpusError(f"corpus.kind must be one of {', '.join(openers)}, not {config.kind!r}")
    return openers[config.kind](config)
