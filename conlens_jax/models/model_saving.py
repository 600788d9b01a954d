"""Writing a model as a Hugging Face folder, which transformers loads as its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from conlens_jax.files.whole import write_whole
from conlens_jax.models.families import family_of
from conlens_jax.models.param_table import Params, leaf
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.models.weight_files import INDEX_FILE, WHOLE_FILE

MAX_FILE_BYTES = 5 * 10**9
_UNFINISHED = ".unfinished"
_PART = "model-{part:05d}-of-{parts:05d}.safetensors"


def save_model(
    folder: Path,
    config: TransformerConfig,
    params: Params,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes config.json and model.safetensors, or several files with an index if one would be
    larger than ``max_file_bytes``. Earlier files are replaced after all new ones are written.

    Raises:
      ValueError: the parameters are not the plain arrays of the family's table (int8).
    """
    _check_plain(config, params)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder, _tensors(config, params), max_file_bytes=max_file_bytes)
    _write_json(folder / "config.json", family_of(config).config_to_hf(config))


def save_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, max_file_bytes: int
) -> None:
    """Writes the weight files of a folder; only the tensors of one file are on the host."""
    for leftover in folder.glob("*" + _UNFINISHED):
        leftover.unlink()
    sizes: list[dict[str, int]] = []
    for number, part in enumerate(_parts(tensors, max_file_bytes)):
        save_file(part, _unfinished(folder, number), metadata={"format": "pt"})
        sizes.append({name: tensor.nbytes for name, tensor in part.items()})
    for old in [folder / INDEX_FILE, folder / WHOLE_FILE, *folder.glob("model-*-of-*.safetensors")]:
        old.unlink(missing_ok=True)
    names = [_PART.format(part=part + 1, parts=len(sizes)) for part in range(len(sizes))]
    if len(names) == 1:
        names = [WHOLE_FILE]
    for part, name in enumerate(names):
        _unfinished(folder, part).rename(folder / name)
    if len(names) > 1:
        total = sum(sum(part.values()) for part in sizes)
        weight_map = {
            tensor: name for name, part in zip(names, sizes, strict=True) for tensor in part
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)


def _check_plain(config: TransformerConfig, params: Params) -> None:
    plain = lambda row: isinstance(leaf(params, row.path), jax.Array | np.ndarray)
    wrong = [".".join(row.path) for row in family_of(config).param_table(config) if not plain(row)]
    if wrong:
        raise ValueError(
            f"params: {', '.join(wrong)} cannot be written to a model folder; load the model "
            "without model.quantise to save it"
        )


def _tensors(config: TransformerConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the files. Rows that are pieces of one tensor are joined, and only one
    tensor at a time is on the host."""
    table = family_of(config).param_table(config)
    by_name = lambda row: row.hf_name
    for _, group in itertools.groupby(sorted(table, key=by_name), by_name):
        rows = list(group)
        for index, name in rows[0].tensor_names(config):
            layers = [np.asarray(_at(leaf(params, row.path), index)) for row in rows]
            tensor = np.empty(rows[0].hf_shape(config, index), layers[0].dtype)
            for row, layer in zip(rows, layers, strict=True):
                row.write(tensor, layer, config, index)
            yield name, tensor


@jax.jit
def _at(array: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    return array[index]


def _parts(
    tensors: Iterable[tuple[str, np.ndarray]], most_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Groups of consecutive tensors, each of at most ``most_bytes`` or a single tensor."""
    part: dict[str, np.ndarray] = {}
    room = most_bytes
    for name, tensor in tensors:
        if part and tensor.nbytes > room:
            yield part
            part, room = {}, most_bytes
        part[name] = tensor
        room -= tensor.nbytes
    yield part


def _unfinished(folder: Path, part: int) -> Path:
    return folder / f"part-{part}{_UNFINISHED}"


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(values, indent=2) + "\n")
