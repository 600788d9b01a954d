"""The safetensors files of a model folder as one mapping from names to arrays.

Files are memory-mapped and an array is a view of the file, so that only the slice that is used is
read, in any order of dimensions.

``safetensors.safe_open(...).get_slice`` was measured instead (safetensors 0.8, 1 GB of bf16, fp16,
int8 and uint8, tensors of 32 MiB read whole, one after the other; 2 busy cores, three runs each):
0.7 to 1.0 s of CPU time for 0.2 to 0.3 s here, 4 to 10 s in all for 1.4 to 2.9, since a slice is a
copy, which is then copied again to transpose it; and 992 MiB of resident memory for 64, since
nothing that was read is released until the file is closed (opened anew for each tensor: 96 MiB, 5
to 9 s). Its message for a file that is cut short is "invalid header length", without a name.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from conlens_jax.models.families import text_parts
from conlens_jax.models.mxfp4 import BLOCKS, MXFP4, SCALES, dequantise_mxfp4
from conlens_jax.models.weight_files import (
    DTYPES,
    StoredTensor,
    some_of,
    stored_tensors,
    weight_files,
)

FLOATS = ("F64", "F32", "F16", "BF16", MXFP4)
# How much of two tensors is compared at once.
_COMPARED_BYTES = 1 << 26
# Buffers in old files of many families.
_IGNORED = (
    r"(.*\.)?rotary_emb\.inv_freq",
    r"(.*\.)?attn\.(masked_)?bias",
    r"(.*\.)?masked_bias",
    r"(.*\.)?position_ids",
)


class TensorFiles(Mapping[str, StoredTensor]):
    """The tensors of a folder by name; every file's header and size is checked at once.

    Raises:
      ValueError: no safetensors, an incomplete index, damaged or truncated files, or a
        tensor that several files contain with different values and without an index.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = weight_files(folder)
        self._mapped: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._parts: set[str] = set()
        self._tensors, undecided = stored_tensors(folder, self.files)
        differing = [
            f"{name} in {', '.join(copy.file.name for copy in copies)}"
            for name, copies in undecided.items()
            if not all(self._is_same(copies[0], other) for other in copies[1:])
        ]
        if differing:
            raise ValueError(
                f"model.path={folder}: several files contain a tensor with different values, and "
                f"no index decides which is read: {some_of(differing)}; if these are several "
                "models, give each a folder of its own"
            )

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name not in self._parts)

    def __len__(self) -> int:
        return len(self._tensors) - len(self._parts)

    def array(self, name: str, part: slice = slice(None)) -> np.ndarray:
        """A tensor, or a part of its first dimension, as a view of its file: what is not used is
        not read. 4-bit tensors are converted to floats."""
        tensor = self._tensors[name]
        if tensor.dtype == MXFP4:
            return dequantise_mxfp4(
                self.array(name + BLOCKS, part), self.array(name + SCALES, part)
            )
        return self._view(tensor, part)

    def same_values(self, name: str, other: str) -> bool:
        """Whether two tensors of plain numbers are equal, independent of their stored dtypes.
        Both are read, a part at a time, up to the first difference."""
        return self._is_same(self._tensors[name], self._tensors[other])

    def _is_same(self, one: StoredTensor, other: StoredTensor) -> bool:
        if one.shape != other.shape:
            return False
        if not {one.dtype, other.dtype} <= DTYPES.keys():
            if one.dtype != other.dtype or one.stop - one.start != other.stop - other.start:
                return False
            one, other = (
                dataclasses.replace(tensor, dtype="U8", shape=(tensor.stop - tensor.start,))
                for tensor in (one, other)
            )
        row_bytes = 8 * math.prod(one.shape[1:])
        rows = max(1, _COMPARED_BYTES // max(1, row_bytes))
        for start in range(0, one.shape[0] if one.shape else 1, rows):
            part = slice(start, start + rows)
            same = _equal(self._view(one, part), self._view(other, part))
            self.release()
            if not same:
                return False
        return True

    def _view(self, tensor: StoredTensor, part: slice = slice(None)) -> np.ndarray:
        raw = np.frombuffer(self._map(tensor.file), np.uint8)[tensor.start : tensor.stop]
        whole = raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
        return whole[part] if whole.ndim else whole

    def _map(self, file: Path) -> mmap.mmap:
        with self._lock:
            if file not in self._mapped:
                with open(file, "rb") as stream:
                    self._mapped[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            return self._mapped[file]

    def release(self) -> None:
        """Frees the memory of what has been read; it can be read again."""
        for mapped in self._mapped.values():
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def take_names_of(
        self, family: ModuleType | None, expected: Iterable[str], prefix: str = ""
    ) -> None:
        """Renames the tensors to the names of a family's table, and drops what no model needs: what
        the family ignores, the parts of a model that read images, and empty tensors.

        A family module may have:
          ``IGNORED``: regular expressions for whole names of tensors that no model needs.
          ``NOT_NEEDED``: the same for names that are dropped where its table does not have them.
          ``RENAMES``: pairs of a regular expression and its replacement, tried on each name.

        Args:
          expected: the names of the table.
          prefix: of the names of the model without its head. As in transformers, a name in a
            file may lack it, or have an extra one.

        Raises:
          ValueError: tensors with the same new name and different values.
        """
        ignored = (*_IGNORED, *text_parts.IGNORED, *getattr(family, "IGNORED", ()))
        ignored = re.compile("|".join(ignored))
        not_needed = re.compile("|".join(getattr(family, "NOT_NEEDED", ())) or "(?!)")
        renames = (*text_parts.RENAMES, *getattr(family, "RENAMES", ()))
        expected = set(expected)
        known = expected | {name + part for name in expected for part in (BLOCKS, SCALES)}

        def renamed(name: str) -> str:
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            others = (prefix + name, name.removeprefix(prefix)) if prefix else ()
            return next((other for other in (name, *others) if other in known), name)

        sources: dict[str, list[str]] = {}
        for name, tensor in self.items():
            if not ignored.fullmatch(name) and 0 not in tensor.shape:
                ours = renamed(name)
                if ours in known or not not_needed.fullmatch(ours):
                    sources.setdefault(ours, []).append(name)
        differing = [
            f"{name} as {' and '.join(copies)}"
            for name, copies in sources.items()
            if not all(self.same_values(copies[0], one) for one in copies[1:])
        ]
        if differing:
            raise ValueError(
                f"model.path={self.folder}: copies of a tensor have different values: "
                + some_of(differing)
            )
        self._tensors = {name: self._tensors[of[0]] for name, of in sources.items()}
        for name in [name for name in expected if name not in self and name + BLOCKS in self]:
            self._join_mxfp4(name)

    def rename(self, name: str, new_name: str) -> None:
        self._tensors[new_name] = self._tensors.pop(name)

    def _join_mxfp4(self, name: str) -> None:
        """Adds the two tensors of a 4-bit matrix under the matrix's name."""
        blocks = self._tensors[name + BLOCKS]
        experts, outputs, n_blocks, n_bytes = blocks.shape
        if name + SCALES not in self or self[name + SCALES].shape != blocks.shape[:-1]:
            raise ValueError(f"{blocks.file}: {name + SCALES} does not fit {name + BLOCKS}")
        shape = (experts, 2 * n_blocks * n_bytes, outputs)
        self._tensors[name] = dataclasses.replace(blocks, dtype=MXFP4, shape=shape)
        self._parts |= {name + BLOCKS, name + SCALES}


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """By value, with 0 equal to -0; the same bits are equal without a conversion."""
    as_bytes = lambda array: array.reshape(-1).view(np.uint8)
    if one.dtype == other.dtype and np.array_equal(as_bytes(one), as_bytes(other)):
        return True
    wide = np.float64 if np.float64 in (one.dtype, other.dtype) else np.float32
    return np.array_equal(one.astype(wide), other.astype(wide))
