"""From the tensors of a folder to arrays on a mesh, each device reading its slices.

A parameter's layers are in many tensors of the file. They are read straight into the stacked array,
for large ones a chunk of layers (or experts) at a time, so that host memory contains at most one
chunk besides what is on the devices.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.tensor_files import TensorFiles
from conlens_jax.models.transformer_config import TransformerConfig

Index = tuple[slice, ...]
CHUNK_BYTES = 1 << 26
# Rows of the file that are transposed together: about a cache line of the result.
_TILE = 16


class ParamReader:
    """Reads parameters, or slices of them, from the files of a model.

    Args:
      on_bytes: called with the number of bytes just read.
      chunk_bytes: how much of a stacked parameter is read at once; at least one layer (or expert).
    """

    def __init__(
        self,
        tensors: TensorFiles,
        config: TransformerConfig,
        *,
        on_bytes: Callable[[int], object] = lambda count: None,
        chunk_bytes: int = CHUNK_BYTES,
    ):
        self.tensors, self.config = tensors, config
        self.on_bytes, self.chunk_bytes = on_bytes, chunk_bytes
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "read")

    def close(self) -> None:
        self._threads.shutdown()

    def load(
        self,
        row: ParamRow,
        sharding: NamedSharding,
        finish: Callable[[jax.Array], object] = lambda part: part,
    ) -> object:
        """The parameter on its devices.

        Args:
          finish: converts each part that was read (to an array, or a tree of arrays whose first
            dimensions are the parameter's).
        """
        shape = row.shape(self.config)
        chunks = list(_chunks(row, shape, self.chunk_bytes // self._itemsize))
        if len(chunks) == 1:
            return finish(self._on_devices(row, chunks[0], sharding))
        whole = None
        for chunk in chunks:
            part = finish(self._on_devices(row, chunk, sharding))
            if whole is None:
                whole = _room(part, n_leading=len(chunk), shape=shape)
            starts = [np.int32(of_dim.start) for of_dim in chunk]
            whole = _write(whole, part, starts)
        return whole

    @property
    def _itemsize(self) -> int:
        return jnp.dtype(self.config.dtype).itemsize

    def _on_devices(self, row: ParamRow, chunk: Index, sharding: NamedSharding) -> jax.Array:
        shape = row.shape(self.config)
        leading = tuple(of_dim.stop - of_dim.start for of_dim in chunk)
        read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def read_once(index: Index) -> np.ndarray:
            """A slice of the chunk, shared by replicas."""
            index = _absolute(index, (*leading, *shape[len(leading) :]))
            key = tuple((of_dim.start, of_dim.stop) for of_dim in index)
            if key not in read:
                moved = tuple(
                    slice(of_dim.start + by.start, of_dim.stop + by.start)
                    for of_dim, by in zip(index, chunk, strict=False)
                )
                read[key] = self.slice(row, moved + index[len(chunk) :])
            return read[key]

        part = jax.make_array_from_callback((*leading, *shape[len(leading) :]), sharding, read_once)
        # Otherwise reading runs ahead of the devices, and many parts are in host memory.
        jax.block_until_ready(part)
        self.tensors.release()
        self.on_bytes(part.nbytes)
        return part

    def slice(self, row: ParamRow, index: Index) -> np.ndarray:
        """A slice of a parameter, in ``config.dtype``; nothing else is read.

        Raises:
          ValueError: numbers beyond the range of ``config.dtype``.
        """
        index = _absolute(index, row.shape(self.config))
        out = np.empty([of_dim.stop - of_dim.start for of_dim in index], self.config.dtype)
        n_leading = len(row.index_dims)
        leading, within = index[:n_leading], index[n_leading:]
        experts = within[0] if row.experts_in_tensor else slice(None)
        if row.experts_in_tensor:
            within = (slice(None), *within[1:])

        def fill(position: tuple[int, ...]) -> None:
            of_dim = [start.start + at for start, at in zip(leading, position, strict=True)]
            if not row.has(of_dim):
                out[position] = 0
                return
            name = row.tensor_name(of_dim)
            source = row.view(self.tensors.array(name, experts), self.config, of_dim)[within]
            with np.errstate(over="ignore"):
                _copy(out[position], source, row)
            if source.dtype == np.float64 and np.any(np.isinf(out[position]) & np.isfinite(source)):
                raise ValueError(
                    f"{self.tensors[name].file}: {name} has numbers in float64 that "
                    f"{self.config.dtype} cannot hold"
                )

        for _ in self._threads.map(fill, np.ndindex(out.shape[:n_leading])):
            pass
        return out


def _copy(target: np.ndarray, source: np.ndarray, row: ParamRow) -> None:
    """Fills an array in our order from a view of the file, in the order of the file."""
    if row.layout != "linear":
        target[...] = source
        return
    target, source = target.transpose(row.file_order), source.transpose(row.file_order)
    *outer, last = source.shape[: row.n_output_dims]
    for position in np.ndindex(*outer):
        for start in range(0, last, _TILE):
            tile = (*position, slice(start, start + _TILE))
            target[tile] = source[tile].astype(target.dtype)


def _chunks(row: ParamRow, shape: tuple[int, ...], most: int) -> Iterator[Index]:
    """Parts of a parameter of at most ``most`` numbers, by slices of its layers and experts."""
    leading = next(n for n, dim in enumerate(row.dims + ".") if dim not in "NE")
    if math.prod(shape) <= most or leading == 0 or leading == len(shape):
        yield ()
        return
    # Cut the first of the leading dimensions of which one index alone is at most ``most``.
    cut = next((n for n in range(leading) if math.prod(shape[n + 1 :]) <= most), leading - 1)
    step = max(1, most // math.prod(shape[cut + 1 :]))
    for outer in np.ndindex(*shape[:cut]):
        for start in range(0, shape[cut], step):
            one = [slice(at, at + 1) for at in outer]
            yield (*one, slice(start, min(start + step, shape[cut])))


def _absolute(index: Index, shape: tuple[int, ...]) -> Index:
    return tuple(
        slice(*of_dim.indices(size)[:2]) for of_dim, size in zip(index, shape, strict=True)
    )


def _room(part: object, *, n_leading: int, shape: tuple[int, ...]) -> object:
    """Zeros for all chunks, sharded like the given one."""

    def zeros(leaf: jax.Array) -> jax.Array:
        full = (*shape[:n_leading], *leaf.shape[n_leading:])
        return jnp.zeros(full, leaf.dtype, device=leaf.sharding)

    return jax.tree.map(zeros, part)


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: object, part: object, starts: list[jax.Array]) -> object:
    """``part`` written in place, at ``starts`` in the leading dimensions."""

    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        zeros = [jnp.int32(0)] * (whole.ndim - len(starts))
        return jax.lax.dynamic_update_slice(whole, part, [*starts, *zeros])

    return jax.tree.map(write, whole, part)
