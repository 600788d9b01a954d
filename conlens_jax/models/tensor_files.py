"""The safetensors files of a model folder, seen as one mapping from names to arrays.

Files are mapped into memory, so that a reader of a slice reads that slice alone, whatever the
order of dimensions: an array here is a view of the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from conlens_jax.models.mxfp4 import BLOCKS, MXFP4, SCALES, dequantise_mxfp4

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U8": np.uint8,
}
FLOATS = ("F64", "F32", "F16", "BF16", MXFP4)
WHOLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
# The longest header that the format's own reader takes.
_MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: ``start`` and ``stop`` are offsets into the file, in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFiles(Mapping[str, StoredTensor]):
    """The tensors of a folder by name; every file's header and size is checked at once.

    Raises:
      ValueError: no safetensors, an incomplete index, damaged or truncated files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = weight_files(folder)
        self._mapped: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._tensors: dict[str, StoredTensor] = {}
        self._parts: set[str] = set()
        for file in self.files:
            self._tensors |= _read_header(file)
        _check_index(folder, self.files, self._tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name not in self._parts)

    def __len__(self) -> int:
        return len(self._tensors) - len(self._parts)

    def array(self, name: str, part: slice = slice(None)) -> np.ndarray:
        """A tensor, or a part of its first dimension, as a view of its file: what is not looked
        at is not read. 4-bit tensors are made into floats."""
        tensor = self._tensors[name]
        if tensor.dtype == MXFP4:
            return dequantise_mxfp4(
                self.array(name + BLOCKS, part), self.array(name + SCALES, part)
            )
        raw = np.frombuffer(self._map(tensor.file), np.uint8)[tensor.start : tensor.stop]
        whole = raw.view(_DTYPES[tensor.dtype]).reshape(tensor.shape)
        return whole[part] if whole.ndim else whole

    def _map(self, file: Path) -> mmap.mmap:
        with self._lock:
            if file not in self._mapped:
                with open(file, "rb") as stream:
                    self._mapped[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            return self._mapped[file]

    def release(self) -> None:
        """Gives back the memory of what has been read; reading it again is possible."""
        for mapped in self._mapped.values():
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def take_names_of(self, family: ModuleType, expected: Iterable[str]) -> None:
        """Gives the tensors the names of a family's table, and forgets what the family ignores.

        A family module may have:
          ``IGNORED``: regular expressions for whole names of tensors that no model needs.
          ``RENAMES``: pairs of a regular expression and its replacement, tried on each name.
          ``OPTIONAL_PREFIX``: what some files leave out in front of their names.
        """
        ignored = re.compile("|".join((*_IGNORED, *getattr(family, "IGNORED", ()))))
        prefix, expected = getattr(family, "OPTIONAL_PREFIX", ""), set(expected)

        def renamed(name: str) -> str:
            for pattern, replacement in getattr(family, "RENAMES", ()):
                name = re.sub(pattern, replacement, name)
            return prefix + name if prefix and prefix + name in expected else name

        kept = {name: tensor for name, tensor in self.items() if not ignored.fullmatch(name)}
        self._tensors = {renamed(name): tensor for name, tensor in kept.items()}
        for name in [name for name in expected if name not in self and name + BLOCKS in self]:
            self._join_mxfp4(name)

    def _join_mxfp4(self, name: str) -> None:
        """Makes the two tensors of a 4-bit matrix known by its own name."""
        blocks = self._tensors[name + BLOCKS]
        experts, outputs, n_blocks, n_bytes = blocks.shape
        if name + SCALES not in self or self[name + SCALES].shape != blocks.shape[:-1]:
            raise ValueError(f"{blocks.file}: {name + SCALES} does not fit {name + BLOCKS}")
        shape = (experts, 2 * n_blocks * n_bytes, outputs)
        self._tensors[name] = dataclasses.replace(blocks, dtype=MXFP4, shape=shape)
        self._parts |= {name + BLOCKS, name + SCALES}


# Buffers that old files of many families carry.
_IGNORED = (r".*\.rotary_emb\.inv_freq", r".*\.attn\.(masked_)?bias", r".*\.masked_bias")


def weight_files(folder: Path) -> list[Path]:
    """As transformers chooses them: one whole file, or else what the index names. Adapters and
    other layouts often lie beside them."""
    whole = folder / WHOLE_FILE
    if whole.exists():
        return [whole]
    index = folder / INDEX_FILE
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = [file.name for pattern in _PICKLES for file in folder.glob(pattern)]
    hint = f"; {', '.join(pickled)} is pickled and is not read: convert it" if pickled else ""
    raise ValueError(f"model.path={folder}: there is no .safetensors file{hint}")


def read_json(file: Path) -> Mapping[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model.path={file.parent}: there is no {file.name}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file: 8 bytes of length, a JSON header of that length, the data.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    damaged = f"{file} is damaged or cut short"
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{damaged}: {size:,} bytes hold no whole header")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{damaged}: its header is not JSON: {error}") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        tensor = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start, stop)
        dtype = _DTYPES.get(tensor.dtype)
        if dtype and math.prod(tensor.shape) * np.dtype(dtype).itemsize != stop - start:
            raise ValueError(f"{damaged}: {name} {tensor.shape} has {stop - start:,} bytes")
        tensors[name] = tensor
    end = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if end > size:
        raise ValueError(f"{damaged}: its header speaks of {end:,} bytes, there are {size:,}")
    return tensors


def _check_index(folder: Path, files: list[Path], tensors: Mapping[str, StoredTensor]) -> None:
    """Every tensor that the index names must be in the file that it names."""
    index = folder / INDEX_FILE
    if files == [folder / WHOLE_FILE] or not index.exists():
        return
    missing = [
        f"{name} in {file}"
        for name, file in read_json(index)["weight_map"].items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(
            f"{index} names tensors that are not there: {', '.join(missing[:10])}{more}"
        )
