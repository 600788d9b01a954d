"""The shape of a model from a config.json alone."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

from conlens_jax.config import EMBEDDED_MODEL, ConfigError, ExperimentConfig
from conlens_jax.embedded.language_model import embedded_shape
from conlens_jax.models.from_gguf.folder import model_of_gguf
from conlens_jax.models.from_gguf.source import gguf_source
from conlens_jax.models.hf_io import read_config, read_config_file
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.transformer_config import TransformerConfig

SHIPPED = Path(__file__).parents[2] / "third_party" / "model_configs"
"""Configs of real models, if the package runs from a checkout."""


class WordCounter:
    """Replaces a missing tokenizer: one token per word and punctuation mark, which is right for a
    prompt of common words with most tokenizers."""

    bos_id = eos_id = 0
    unk_id = None

    def encode(self, text: str) -> list[int]:
        return list(range(1, 1 + len(re.findall(r"\w+|[^\w\s]", text))))


class PlannedModel(NamedTuple):
    """A model without its weights.

    Attributes:
      name: its name in the report.
      source: the source of its shape.
      shape: with the settings of the config.
      tokenizer: the folder's, or a :class:`WordCounter`.
    """

    name: str
    source: str
    shape: TransformerConfig
    tokenizer: Tokenizer | WordCounter


def planned_model(config: ExperimentConfig, model_config: str = "") -> PlannedModel:
    """Finds the config.json of ``config.model``, or reads the file (or folder) ``model_config``.

    ``model.path`` may be ``"embedded"``, a folder or a config.json, a GGUF file or the name of an
    installed model, or a hub id: then its file in ``third_party/model_configs`` is read if there is
    one, otherwise config.json is downloaded.

    Raises:
      ConfigError: there is no such file.
      ValueError: the file has settings that are not supported.
    """
    path = model_config or config.model.path
    if path == EMBEDDED_MODEL:
        shape = embedded_shape(config.embedded, config.embedded.vocab_size)
        return PlannedModel(path, "the section embedded", _as_run(shape, config), WordCounter())
    if gguf := gguf_source(path):
        shape, tokenizer = model_of_gguf(gguf)
        return PlannedModel(path, str(gguf), _as_run(shape, config), tokenizer)
    file = _config_file(path, config.model.revision, "--model-config" if model_config else "")
    shape = _shape_of(file)
    tokenizer = WordCounter()
    if (file.parent / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(file.parent)
    return PlannedModel(path, str(file), _as_run(shape, config), tokenizer)


def _shape_of(file: Path) -> TransformerConfig:
    """Also considers the weights in the folder, if they are complete: a separate head is memory."""
    if file.name == "config.json":
        with contextlib.suppress(ValueError):
            return read_config(file.parent)
    return read_config_file(file)


def _as_run(shape: TransformerConfig, config: ExperimentConfig) -> TransformerConfig:
    model = config.model
    return dataclasses.replace(
        shape,
        dtype=model.dtype,
        unroll=model.unroll,
        remat=model.remat,
        quantise=model.quantise,
        attention=model.attention,
    )


def _config_file(path: str, revision: str, flag: str) -> Path:
    given = Path(path).expanduser()
    shipped = SHIPPED / f"{given.name}.json"
    for file in (given / "config.json", given):
        if file.is_file():
            return file
    name = flag or "model.path"
    if flag or given.is_dir() or path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise ConfigError(f"{name}={path!r}: not a file, nor a folder with a config.json")
    if shipped.is_file():
        return shipped
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "config.json", revision=revision or None))
    except Exception as error:  # the hub client raises many kinds, which mean the same to the user
        raise ConfigError(
            f"{name}={path!r}: not a folder, not a name of third_party/model_configs, and its "
            f"config.json could not be downloaded ({type(error).__name__}); give the file with "
            "--model-config=path/to/config.json"
        ) from error
