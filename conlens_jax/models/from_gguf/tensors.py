"""The tensors of a GGUF file under the names and in the order of a family's table.

llama.cpp keeps every matrix as [out, in], fused ones part after part, the experts of a layer
together, and norms with their offset added. The table of a family says how ours differ from that.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from conlens_jax.models.families import family_of
from conlens_jax.models.from_gguf.architectures import Architecture
from conlens_jax.models.from_gguf.header import GGUFFile
from conlens_jax.models.from_gguf.metadata import OTHER_PARTS, ROPE_TENSORS
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.transformer_config import TransformerConfig

# A quantised number is a scale times an integer, which 16 bits would round.
_DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
_CHUNK_BYTES = 1 << 27
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter within a tensor that is written.

    Attributes:
      row: of the family's table.
      source: the tensor of the GGUF file.
      item: which expert, or head, of the source; None for all that it has.
      alone: the source has no other parameters, even if what is written has.
    """

    row: ParamRow
    source: str
    item: int | None
    alone: bool

    def stored(self) -> ParamRow:
        """The row of the source."""
        piece = self.row.piece
        if piece:
            piece = None if self.alone else dataclasses.replace(piece, by="")
        layout = "linear" if self.row.layout == "conv1d" else self.row.layout
        return dataclasses.replace(self.row, layout=layout, piece=piece)


@dataclasses.dataclass(frozen=True)
class Target:
    """A tensor that is written, joined of one or several parameters."""

    name: str
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


def targets(file: GGUFFile, architecture: Architecture, config: TransformerConfig) -> list[Target]:
    """Every tensor of the family's table, with its source.

    Raises:
      ValueError: missing, unexpected or misshaped tensors, all listed.
    """
    table = sorted(family_of(config).param_table(config), key=lambda row: row.hf_name)
    name_of = _names(file, architecture, config)
    found, problems, used = [], [], set(ROPE_TENSORS)
    for _, group in itertools.groupby(table, lambda row: row.hf_name):
        rows = list(group)
        for index, name in rows[0].tensor_names(config):
            item = index[-1] if rows[0].index_dims not in ("", "N") else None
            layer = index[0] if rows[0].stacked else None
            parts = tuple(
                Part(row, name_of(row, layer), item, row.path[-1] in architecture.names)
                for row in rows
            )
            used |= {part.source for part in parts}
            wrong = [problem for part in parts for problem in _problems(file, part, config)]
            problems += wrong
            if not wrong:
                dtype = np.dtype(_dtype(file, parts, config))
                found.append(Target(name, parts, rows[0].hf_shape(config), dtype))
    is_known = lambda name: name in used or name.startswith(OTHER_PARTS)
    problems += [f"unexpected: {name}" for name in file.tensors if not is_known(name)]
    if problems := list(dict.fromkeys(problems)):
        more = [f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        listing = "\n".join(f"  - {problem}" for problem in [*problems[:_SHOWN], *more])
        raise ValueError(f"{file.path}: the tensors do not fit the metadata:\n{listing}")
    return found


def _names(file: GGUFFile, architecture: Architecture, config: TransformerConfig):
    """GGUF's name of a parameter of a layer."""
    import gguf

    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(by_name[file.architecture], config.n_layers)

    def name_of(row: ParamRow, layer: int | None) -> str:
        if own := architecture.names.get(row.path[-1]):
            return f"blk.{layer}.{own}"
        # llama.cpp puts all experts of a layer, or the norms of all heads, into one tensor.
        hf_name = row.hf_name.replace(".norms.{head}", "").replace(".{expert}", "")
        hf_name = hf_name.format(layer=layer)
        return known.get_name(hf_name, (".weight", ".bias")) or hf_name

    return name_of


def _problems(file: GGUFFile, part: Part, config: TransformerConfig) -> Iterator[str]:
    expected = part.stored().hf_shape(config)
    if part.item is not None:
        expected = (config.dim_sizes[part.row.index_dims[-1]], *expected)
    if part.source not in file.tensors:
        yield f"missing: {part.source} {expected}"
    elif (shape := file.tensors[part.source].shape) != expected:
        yield f"misshaped: {part.source} is {shape}, by the metadata {expected}"


def _dtype(file: GGUFFile, parts: tuple[Part, ...], config: TransformerConfig):
    kinds = {file.tensors[part.source].kind for part in parts}
    if len(kinds) > 1 or _has_offset(parts[0].row, config):
        return np.float32
    return _DTYPES.get(kinds.pop(), np.float32)


def _has_offset(row: ParamRow, config: TransformerConfig) -> bool:
    return bool(config.norm_offset) and row.path[-1].endswith("norm")


def read_tensor(
    file: GGUFFile, target: Target, architecture: Architecture, config: TransformerConfig
) -> np.ndarray:
    """The values of a tensor that is written."""
    first, whole = target.parts[0], np.empty(target.shape, target.dtype)
    if first.row.path in (("embedding",), ("output_head",)):  # large: dequantised piece by piece
        rows, columns = target.shape
        at_once = max(1, _CHUNK_BYTES // (4 * columns))
        for start in range(0, rows, at_once):
            piece = slice(start, start + at_once)
            whole[piece] = file.array(first.source, piece)
        return whole
    for part in target.parts:
        chosen = slice(None) if part.item is None else slice(part.item, part.item + 1)
        source = file.array(part.source, chosen)
        ours = part.stored().view(source if part.item is None else source[0], config)
        if architecture.permuted and part.row.path[-1].startswith(("query", "key")):
            pairs = ours.reshape(*ours.shape[:-1], -1, 2)
            ours = pairs.swapaxes(-1, -2).reshape(ours.shape)
        if _has_offset(part.row, config):
            ours = ours.astype(np.float32) - np.float32(config.norm_offset)
        part.row.write(whole, ours, config)
    return whole
