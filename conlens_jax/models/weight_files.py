"""Which safetensors files a model folder is read from, and where in them each tensor is."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_LOG = logging.getLogger(__name__)
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U8": np.uint8,
}
WHOLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_OTHER_FORMATS = ("*.onnx", "*.h5", "*.msgpack", "*.npz")
# Mistral's and Meta's own names of tensors.
_ORIGINAL = "consolidated"
# The longest header that the format's own reader accepts.
_MAX_HEADER_BYTES = 100_000_000
LFS_POINTER = b"version https://git-lfs"
_NAMES_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: ``start`` and ``stop`` are offsets into the file, in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: one whole file, or else those that the index names. There
    are often adapters and other layouts next to them. In a folder with neither, which is an error
    in transformers, all safetensors files are read."""
    whole = folder / WHOLE_FILE
    if whole.exists():
        return [whole]
    index = folder / INDEX_FILE
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files and all(file.name.startswith(_ORIGINAL) for file in files):
        raise ValueError(
            f"model.path={folder}: {files[0].name} has its maker's own layout; transformers' files "
            "of this model (model*.safetensors and config.json) are needed"
        )
    if files:
        return files
    raise ValueError(f"model.path={folder}: there is no .safetensors file{_instead(folder)}")


def _instead(folder: Path) -> str:
    """What is there instead, and how to use it."""
    names = lambda patterns: sorted(f.name for pattern in patterns for f in folder.glob(pattern))
    if others := names(("*.gguf",)):
        return f"; for {others[0]}, give that file as model.path"
    if pickled := names(_PICKLES):
        convert = (
            f'; convert it where torch is installed:\n  python -c "from transformers import '
            f"AutoModelForCausalLM as Model; Model.from_pretrained('{folder}')"
            f".save_pretrained('{folder}')\""
        )
        is_hf = any(name.startswith("pytorch_model") for name in pickled)
        return f"; {some_of(pickled)} is pickled and is not read" + convert * is_hf
    if others := names(_OTHER_FORMATS):
        return f"; {some_of(others)} is of another program and is not read"
    return ""


def stored_tensors(
    folder: Path, files: list[Path]
) -> tuple[dict[str, StoredTensor], dict[str, list[StoredTensor]]]:
    """The tensors of the files by name. If several files contain one, the index decides.

    Returns:
      The tensors, and all copies of those that several files contain and no index decides.

    Raises:
      ValueError: damaged files; an index with a tensor that its file lacks.
    """
    held = {file: _read_header(file) for file in files}
    everywhere: dict[str, list[StoredTensor]] = {}
    for tensors in held.values():
        for name, tensor in tensors.items():
            everywhere.setdefault(name, []).append(tensor)
    decided, index = {}, folder / INDEX_FILE
    if files != [folder / WHOLE_FILE] and index.exists():
        decided = _by_index(index, held)
    elif len(files) > 1:
        _LOG.warning("%s: there is no %s, so all %d files are read", folder, INDEX_FILE, len(files))
    several = {name: copies for name, copies in everywhere.items() if len(copies) > 1}
    if ruled := [name for name in several if name in decided]:
        _LOG.warning(
            "%s: several files contain %s; the index decides which is read", folder, some_of(ruled)
        )
    undecided = {name: copies for name, copies in several.items() if name not in decided}
    return {name: copies[0] for name, copies in everywhere.items()} | decided, undecided


def read_json(file: Path) -> Mapping[str, Any]:
    """Raises ValueError for a missing file, or one that is not a JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model.path={file.parent}: there is no {file.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must contain a JSON object, not {type(found).__name__}")
    return found


def indexed_files(folder: Path) -> dict[str, str]:
    """The file of each tensor that the folder's index names; empty without an index."""
    index = folder / INDEX_FILE
    return _weight_map(index) if index.exists() else {}


def some_of(names: Iterable[str]) -> str:
    """The first of many names, for a message."""
    names = list(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{index} has no weight_map from names of tensors to names of files")
    return found


def _by_index(
    index: Path, held: Mapping[Path, Mapping[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """The tensors that an index names, each from the file that it names."""
    decided, missing = {}, []
    for name, file in _weight_map(index).items():
        tensor = held[index.parent / file].get(name)
        if tensor is None:
            elsewhere = [other.name for other, tensors in held.items() if name in tensors]
            there = f" (it is in {', '.join(elsewhere)})" if elsewhere else ""
            missing.append(f"{name} in {file}{there}")
        else:
            decided[name] = tensor
    if missing:
        raise ValueError(f"{index} names tensors that are not there: {some_of(missing)}")
    return decided


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file: 8 bytes of length, a JSON header of that length, the data.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    damaged = f"{file} is damaged or cut short"
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            if (start + stream.read(32)).startswith(LFS_POINTER):
                raise ValueError(
                    f"{file} is a Git LFS pointer, not the weights: run git lfs pull in its folder"
                )
            raise ValueError(f"{damaged}: {size:,} bytes contain no whole header")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{damaged}: its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{damaged}: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            first, last = (8 + length + offset for offset in entry["data_offsets"])
            tensor = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), first, last)
            n_numbers = math.prod(tensor.shape)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{damaged}: its header does not describe {name!r}") from None
        dtype = DTYPES.get(tensor.dtype)
        if dtype and n_numbers * np.dtype(dtype).itemsize != last - first:
            raise ValueError(f"{damaged}: {name} {tensor.shape} has {last - first:,} bytes")
        tensors[name] = tensor
    end = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if end > size:
        raise ValueError(f"{damaged}: its header describes {end:,} bytes, the file has {size:,}")
    return tensors
