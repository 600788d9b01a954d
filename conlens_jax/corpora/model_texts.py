"""Documents that the model has written (``corpus.kind="model"``): jsonl files of one batch each.

:mod:`conlens_jax.data.model_documents` writes them. A folder belongs to one recipe: everything that
determines the texts except their number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora.corpus import CorpusError, IndexedCorpus
from conlens_jax.corpora.prompts import read_prompts
from conlens_jax.corpora.text_files import parsed
from conlens_jax.corpora.text_lines import lines

RECIPE_FILE = "recipe.json"


def batch_file(folder: Path, number: int) -> Path:
    """The file of documents ``number · corpus.batch_size`` and following."""
    return folder / f"batch-{number:06d}.jsonl"


def open_model_texts(config: CorpusConfig, folder: Path | None = None) -> IndexedCorpus:
    """The documents in ``folder``. Without one only the prompts are checked, and reading fails.

    Raises:
      CorpusError: the prompts cannot be read.
    """
    read_prompts(config)

    def read(split: str, start: int) -> Iterator[tuple[int, str]]:
        if folder is None:
            raise CorpusError("corpus.kind='model': its documents are written by a loaded model")
        first, skipped = divmod(start, config.batch_size)
        for number in range(first, -(-config.n_documents // config.batch_size)):
            file = batch_file(folder, number)
            for place, line in enumerate(lines(file)):
                if number > first or place >= skipped:
                    row = parsed(line, f"{file}, line {place + 1}")
                    yield number * config.batch_size + place, row["text"]

    # Not the folder: the same texts are the same corpus wherever they are.
    details = {"path": ""}
    if folder is not None:
        details["recipe"] = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    return IndexedCorpus(name=f"model:{folder or ''}", config=config, read=read, details=details)
