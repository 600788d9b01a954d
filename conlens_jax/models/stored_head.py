"""Whether a model's output head is its embedding: the files decide, and not config.json alone.

transformers ties the two where ``tie_word_embeddings`` says so and the files do not hold a head
with other values; this follows it.
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
    """The tensors of a folder by the names of the family's table, a head among them even where it
    is tied. Where a tied model's files hold the head alone, it stands for the embedding."""
    embedding, head = end_names(config)
    # The head is known to an untied model's table only.
    table = family_of(config).param_table(dataclasses.replace(config, tied_embeddings=False))
    expected = [name for row in table for _, name in row.tensor_names(config)]
    tensors = TensorFiles(folder)
    tensors.take_names_of(family_of(config), expected, embedding.partition(".")[0] + ".")
    if config.tied_embeddings and head in tensors and embedding not in tensors:
        tensors.rename(head, embedding)
    return tensors


def end_names(config: TransformerConfig) -> tuple[str, str]:
    """What the embedding and the output head are called in the files."""
    table = family_of(config).param_table(dataclasses.replace(config, tied_embeddings=False))
    by_path = {row.path: row.hf_name for row in table}
    return by_path["embedding",], by_path["output_head",]


def with_stored_head(config: TransformerConfig, folder: Path) -> TransformerConfig:
    """The config, untied where the folder's files hold a head that differs from the embedding;
    one line in the log then says so. Both are read for that, a part at a time.

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
        "%s: tie_word_embeddings is true, but the files hold %s and it differs from %s; it is the "
        "model's head, as in transformers",
        folder,
        head,
        embedding,
    )
    return dataclasses.replace(config, tied_embeddings=False)
