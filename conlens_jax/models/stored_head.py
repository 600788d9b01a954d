"""Whether a model's output head is its embedding: decided by the files, not config.json alone.

As in transformers, the two are tied if ``tie_word_embeddings`` is true and the files do not contain
a head with other values.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from conlens_jax.models.families import family_of
from conlens_jax.models.tensor_files import TensorFiles
from conlens_jax.models.transformer_config import TransformerConfig

_LOG = logging.getLogger(__name__)


def named_tensors(folder: Path, config: TransformerConfig) -> TensorFiles:
    """The tensors of a folder by the names of the family's table, including a head even if it is
    tied. If a tied model's files contain only the head, it is used as the embedding."""
    embedding, head = end_names(config)
    # Only an untied model's table has a row for the head.
    table = family_of(config).param_table(dataclasses.replace(config, tied_embeddings=False))
    expected = [name for row in table for _, name in row.tensor_names(config)]
    tensors = TensorFiles(folder)
    tensors.take_names_of(family_of(config), expected, embedding.partition(".")[0] + ".")
    if config.tied_embeddings and head in tensors and embedding not in tensors:
        tensors.rename(head, embedding)
    return tensors


def end_names(config: TransformerConfig) -> tuple[str, str]:
    """The names of the embedding and the output head in the files."""
    table = family_of(config).param_table(dataclasses.replace(config, tied_embeddings=False))
    by_path = {row.path: row.hf_name for row in table}
    return by_path["embedding",], by_path["output_head",]


def with_stored_head(config: TransformerConfig, folder: Path) -> TransformerConfig:
    """The config, untied (and a warning logged) if the folder's files contain a head that differs
    from the embedding. Both are read for that, a part at a time.

    Raises:
      ValueError: files that cannot be read.
    """
    if not config.tied_embeddings or not any(folder.glob("*.safetensors")):
        return config
    tensors = named_tensors(folder, config)
    embedding, head = end_names(config)
    if head not in tensors or tensors.same_values(embedding, head):
        return config
    _LOG.warning(
        "%s: tie_word_embeddings is true, but the files contain %s and it differs from %s; it is "
        "used as the model's head, as in transformers",
        folder,
        head,
        embedding,
    )
    return dataclasses.replace(config, tied_embeddings=False)
