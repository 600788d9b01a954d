"""The header of a GGUF file: its metadata, and where in the file each tensor is.

The ``gguf`` package has a reader too, which takes half a minute for a vocabulary of 262,144.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from conlens_jax.models.weight_files import LFS_POINTER

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_FINGERPRINT_BYTES = 4096
# Types of metadata values, by their number in the file.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor is.

    Attributes:
      kind: how it is stored, by ggml's name: ``"F32"``, ``"Q4_K"``.
      shape: of its values, outputs first as in torch.
      start, stop: offsets into the file, in bytes.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A GGUF file, of which only the header has been read.

    Attributes:
      metadata: values by key; arrays are lists.
      tensors: by GGUF's names, in the order of the file.
      header_bytes: length of the header.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    header_bytes: int

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    def array(self, name: str, part: slice = slice(None)) -> np.ndarray:
        """The values of a tensor, or of a part of its first dimension, as stored (F32, F16)
        or dequantised to fp32; BF16 becomes fp32 too, without loss."""
        import gguf

        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType[tensor.kind]
        *rows, columns = tensor.shape
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = np.memmap(self.path, np.uint8, "r")[tensor.start : tensor.stop]
        raw = raw.reshape(*rows, columns // block * block_bytes)
        raw = np.ascontiguousarray(raw[part] if rows else raw)
        return raw.view(np.float16) if tensor.kind == "F16" else gguf.dequantize(raw, kind)

    def fingerprint(self) -> str:
        """A hash that identifies the file and is cheap at any size: sha256 over its size, its
        header, and the first and last 4 KiB of every tensor."""
        digest = hashlib.sha256(str(self.path.stat().st_size).encode())
        with open(self.path, "rb") as stream:
            digest.update(stream.read(self.header_bytes))
            for tensor in self.tensors.values():
                for start in (tensor.start, max(tensor.start, tensor.stop - _FINGERPRINT_BYTES)):
                    stream.seek(start)
                    digest.update(stream.read(min(_FINGERPRINT_BYTES, tensor.stop - start)))
        return digest.hexdigest()


def read_gguf(path: Path) -> GGUFFile:
    """Reads the header of a file.

    Raises:
      ValueError: not a GGUF file, damaged or cut short, another version of the format, one part
        of several, or a tensor stored in a way that the installed ``gguf`` does not know.
    """
    with open(path, "rb") as stream:
        first = stream.read(len(LFS_POINTER))
        if not first.startswith(MAGIC):
            raise ValueError(f"{path} {_not_gguf(first)}")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, _Cursor(data))
            except (struct.error, UnicodeDecodeError, MemoryError, OverflowError):
                raise ValueError(
                    f"{path} is damaged or cut short: its {len(data):,} bytes contain no whole "
                    "header; copy or download it again"
                ) from None


def _not_gguf(first: bytes) -> str:
    if first.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the model: run git lfs pull in its folder"
    return f"is not a GGUF file: it begins with {first[:4]!r}, not {MAGIC!r}"


class _Cursor:
    """Reads little-endian values one after the other; struct.error where the data end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > len(self.data) - self.at:
            raise struct.error
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_code(kind))
        kind, count = self.number("I"), self.number("Q")
        if count > len(self.data) - self.at:  # every element has a byte at least
            raise struct.error
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        values = struct.unpack_from(f"<{count}{_code(kind)}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{_code(kind)}")
        return list(values)


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise struct.error
    return _NUMBERS[kind]


def _parse(path: Path, cursor: _Cursor) -> GGUFFile:
    cursor.at = len(MAGIC)
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = " (big-endian)" if version >> 16 else ""
        raise ValueError(
            f"{path} is of version {version}{swapped} of GGUF; known are little-endian files of "
            f"version {' and '.join(map(str, _VERSIONS))}: convert it again with llama.cpp"
        )
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(n_values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError(f"{path}: its metadata have no general.architecture, so it is no model")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts: join them with llama.cpp's llama-gguf-split --merge"
        )
    entries = []
    for _ in range(n_tensors):
        name = cursor.text()
        shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
        entries.append((name, tuple(reversed(shape)), cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get(_ALIGNMENT, 32)
    first = math.ceil(cursor.at / alignment) * alignment
    tensors = {
        name: _tensor(path, name, shape, kind, first + offset)
        for name, shape, kind, offset in entries
    }
    end, size = max((tensor.stop for tensor in tensors.values()), default=first), len(cursor.data)
    if end > size:
        raise ValueError(
            f"{path} is cut short: its header describes {end:,} bytes, the file has {size:,}; copy "
            "or download it again"
        )
    return GGUFFile(path, metadata, tensors, cursor.at)


def _tensor(path: Path, name: str, shape: tuple[int, ...], number: int, start: int) -> GGUFTensor:
    kind, block, block_bytes = _kind(number)
    if not block:
        raise ValueError(
            f"{path}: {name} is quantised as {kind}, which the installed gguf cannot read; where "
            "it is a new kind: pip install -U gguf"
        )
    if not shape or shape[-1] % block:
        raise ValueError(f"{path} is damaged: {name} {shape} has no whole blocks of {block}")
    return GGUFTensor(kind, shape, start, start + math.prod(shape) // block * block_bytes)


@functools.cache
def _kind(number: int) -> tuple[str, int, int]:
    """The name of a kind, the values of a block and their bytes; no values where the installed
    ``gguf`` cannot dequantise it."""
    import gguf

    if number not in {kind.value for kind in gguf.GGMLQuantizationType}:
        return str(number), 0, 0
    kind = gguf.GGMLQuantizationType(number)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return kind.name, 0, 0
    return kind.name, block, block_bytes
