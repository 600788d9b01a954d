"""All generators, by ``corpus.kind``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from conlens_jax.corpora.generated import Generator
from conlens_jax.corpora.stories import STORIES
from conlens_jax.corpora.sums import SUMS

GENERATORS: Mapping[str, Generator] = MappingProxyType(
    {generator.kind: generator for generator in (STORIES, SUMS)}
)
