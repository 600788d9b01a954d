"""A GGUF file as an ordinary model folder, converted once and kept in the cache."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

from conlens_jax.files.paths import cache_folder
from conlens_jax.models.families import config_from_hf
from conlens_jax.models.from_gguf.architectures import config_values
from conlens_jax.models.from_gguf.header import GGUFFile, read_gguf
from conlens_jax.models.from_gguf.tensors import read_tensor, targets
from conlens_jax.models.from_gguf.tokenizer import tokenizer_files
from conlens_jax.models.model_saving import save_tensors
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.transformer_config import TransformerConfig

_LOG = logging.getLogger(__name__)
# Part of a folder's name: a change of it converts every file again.
_FORMAT = 1
_PARTIAL, _OLD_SECONDS = ".partial", 24 * 3600
# Of a weight file: so much, or one tensor, is in memory at once.
_FILE_BYTES = 1 << 28


def folder_of_gguf(path: Path) -> Path:
    """The folder with the model of a GGUF file, converted now if there is none in the cache yet.

    Quantised tensors become fp32, which they fit without rounding; others keep their dtype.

    Raises:
      ValueError: the package ``gguf`` is missing, or the file cannot be used; see
        :func:`read_gguf`, :func:`config_values`, :func:`targets` and :func:`tokenizer_files`.
    """
    file = open_gguf(path)
    name = f"{path.stem}-{_FORMAT}-{file.fingerprint()[:12]}"
    folder = cache_folder() / "gguf" / name
    if (folder / "config.json").exists():
        return folder
    _remove_leftovers(folder.parent)
    building = folder.with_name(f"{name}.{os.getpid()}{_PARTIAL}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        _convert(file, building)
        try:
            building.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
            # Another process was faster.
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def model_of_gguf(path: Path) -> tuple[TransformerConfig, Tokenizer]:
    """The shape and the tokenizer of a GGUF file, which is not converted for that.

    Raises:
      ValueError: as :func:`folder_of_gguf`.
    """
    file = open_gguf(path)
    files = tokenizer_files(file)
    tokenizer_json = files.pop("tokenizer.json")
    return config_from_hf(config_values(file)[1]), Tokenizer(tokenizer_json, files)


def open_gguf(path: Path) -> GGUFFile:
    """:func:`read_gguf`, with a message where the package for it is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(
            f"model.path={str(path)!r}: a .gguf file needs the package gguf: "
            "pip install 'conlens_jax[gguf]'"
        ) from None
    return read_gguf(path)


def _remove_leftovers(cache: Path) -> None:
    """What conversions that were killed have left; younger ones may still be going on."""
    for folder in cache.glob("*" + _PARTIAL):
        with contextlib.suppress(OSError):  # another process may do the same
            if time.time() - folder.stat().st_mtime > _OLD_SECONDS:
                shutil.rmtree(folder)


def _convert(file: GGUFFile, folder: Path) -> None:
    architecture, config_json = config_values(file)
    config = config_from_hf(config_json)
    tensors = targets(file, architecture, config)
    for name, content in tokenizer_files(file).items():
        (folder / name).write_bytes(content)
    needed = sum(math.prod(target.shape) * target.dtype.itemsize for target in tensors)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{file.path}: converting it takes {needed / 1e9:.1f} GB in {folder.parent}, which has "
            f"{free / 1e9:.1f} GB free; make room, or set CONLENS_CACHE to another folder"
        )
    _LOG.warning("%s: converting it to a folder of %.1f GB", file.path.name, needed / 1e9)
    read = ((target.name, read_tensor(file, target, architecture, config)) for target in tensors)
    save_tensors(folder, read, max_file_bytes=_FILE_BYTES)
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", "utf-8")
