"""Shard files of the activation cache, in the safetensors format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from conlens_jax.data.cache_metadata import Shard
from conlens_jax.data.rows import ACTIVATION_DTYPES, Rows

_SAFETENSORS_DTYPES = {
    "F32": ACTIVATION_DTYPES["float32"],
    "BF16": ACTIVATION_DTYPES["bfloat16"],
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


def shard_chunks(rows: Rows) -> list[bytes | memoryview]:
    """The safetensors file of ``rows``, in chunks: the header, then the bytes of each array.

    The header is built here and not by the library, so that the same rows always give the same
    bytes. Activations come last, which keeps the integers aligned for any ``N·D``.
    """
    codes = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}
    names = [field.name for field in dataclasses.fields(Rows)]
    if not rows.targets_NT.shape[1]:
        names.remove("targets_NT")
    arrays = {
        name: np.ascontiguousarray(getattr(rows, name)) for name in reversed(names)
    }  # documents (int64) first
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": codes[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    payload = [array.reshape(-1).view(np.uint8).data for array in arrays.values()]
    return [len(text).to_bytes(8, "little") + text, *payload]


def shard_problem(folder: Path, shard: Shard, with_hash: bool) -> str | None:
    path = folder / shard.file
    if Path(shard.file).name != shard.file:
        return f"{shard.file}: a shard must be directly in the cache folder"
    if not path.is_file():
        return f"{shard.file}: missing"
    size = path.stat().st_size
    if size != shard.n_bytes:
        return f"{shard.file}: {size} bytes instead of {shard.n_bytes}"
    if with_hash:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return f"{shard.file}: altered (sha256 does not match)"
    return None


def shard_stamp(path: Path) -> tuple[int, ...] | None:
    """Inode, size and modification time, to detect changes without reading the file; None if it
    does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def map_shard(path: Path) -> Rows:
    """The arrays of a shard as views of the memory-mapped file, read on access."""
    data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        flat = data[start + begin : start + end].view(_SAFETENSORS_DTYPES[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"])
    return Rows(**arrays)
