"""What a model writes its documents from (``corpus.kind="model"``): requests, or beginnings."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from conlens_jax.config import CorpusConfig
from conlens_jax.config.seeds import numpy_seed
from conlens_jax.corpora.corpus import CorpusError
from conlens_jax.corpora.text_files import JSONL_SUFFIXES, json_rows
from conlens_jax.corpora.text_lines import lines


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompt of each document, a pure function of its index.

    Attributes:
      texts: those of a file, in turn; the empty text is the bos token alone.
      topics: if not empty, ``texts`` are requests with a place for one, and both are drawn.
      seed: of the draws.
    """

    texts: Sequence[str]
    topics: Sequence[str] = ()
    seed: int = 0

    def __getitem__(self, index: int) -> str:
        if not self.topics:
            return self.texts[index % len(self.texts)]
        rng = np.random.default_rng((numpy_seed(self.seed), index))
        pick = lambda options: options[rng.integers(len(options))]
        return pick(self.texts).format(topic=pick(self.topics))

    @property
    def digest(self) -> str:
        """A hash of everything but the seed."""
        return hashlib.sha256(repr((list(self.texts), list(self.topics))).encode()).hexdigest()


def read_prompts(config: CorpusConfig) -> Prompts:
    """The prompts that ``corpus.writes``, ``corpus.prompts`` and ``corpus.seed`` ask for.

    Raises:
      CorpusError: the file does not exist, cannot be read, or has no prompt.
    """
    if config.prompts:
        return Prompts(_of_file(config))
    if config.writes == "continuations":
        return Prompts(("",))
    return Prompts(_packaged("requests.txt"), _packaged("topics.txt"), config.seed)


def _packaged(name: str) -> tuple[str, ...]:
    file = resources.files("conlens_jax.corpora") / name
    return tuple(file.read_text(encoding="utf-8").splitlines())


def _of_file(config: CorpusConfig) -> tuple[str, ...]:
    file = Path(config.prompts)
    if not file.is_file():
        raise CorpusError(f"corpus.prompts={config.prompts!r}: there is no such file")
    if file.name.endswith(JSONL_SUFFIXES):
        texts = json_rows(file, config)
    else:
        texts = lines(file, config.encoding_errors)
    found = tuple(text.strip() for text in texts if text.strip())
    if not found:
        raise CorpusError(f"corpus.prompts={config.prompts!r}: the file has no prompt")
    return found
