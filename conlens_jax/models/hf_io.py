"""Reading Hugging Face model folders: config.json, safetensors, no pickle, no remote code."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Set
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from conlens_jax.models.embeddings import LAYER_INPUT_ROWS
from conlens_jax.models.families import config_from_hf, family_of
from conlens_jax.models.hf_config import parse_token_ids
from conlens_jax.models.hub import resolve_folder
from conlens_jax.models.model_saving import save_model
from conlens_jax.models.other_formats import check_folder, refuse_quantised
from conlens_jax.models.param_loading import CHUNK_BYTES, ParamReader
from conlens_jax.models.param_table import ParamRow, Params, build_tree, count_params, leaf
from conlens_jax.models.quantized import Int8Matrix, quantise
from conlens_jax.models.sharding import param_shardings
from conlens_jax.models.stored_head import end_names, named_tensors, with_stored_head
from conlens_jax.models.tensor_files import FLOATS, TensorFiles
from conlens_jax.models.transformer_config import TransformerConfig, array_dtype
from conlens_jax.models.weight_files import indexed_files, read_json, weight_files
from conlens_jax.parallel.mesh import single_device_mesh

__all__ = ["load_params", "read_config", "resolve_folder", "save_model", "weights_fingerprint"]

BELOW_THE_LAYERS = ("embedding", "position_embedding", *LAYER_INPUT_ROWS)
"""Rows of a model's table that make the input of the first layer."""
GENERATION_FILE = "generation_config.json"
_FINGERPRINT_BYTES = 4096


def read_config(folder: Path) -> TransformerConfig:
    """The shape of the model in a folder, by all of its files: config.json (see
    :func:`read_config_file`), the tokens that end a text in generation_config.json, and whether the
    weights contain a separate head.

    Raises:
      ValueError: not a supported model, or files that cannot be read.
    """
    check_folder(folder)
    config = read_config_file(folder / "config.json")
    return with_stored_head(_with_generation_ends(config, folder / GENERATION_FILE), folder)


def read_config_file(file: Path) -> TransformerConfig:
    """The shape of the model that a config.json describes.

    Raises:
      ValueError: not a supported model, or stored in an unsupported format.
    """
    values = dict(read_json(file))
    refuse_quantised(values, file)
    values.pop("quantization_config", None)
    try:
        return config_from_hf(values)
    except ValueError as error:
        message = str(error).removeprefix("config.json")
        raise ValueError(
            f"{file}{message}" if message != str(error) else f"{file}: {error}"
        ) from None


def _with_generation_ends(config: TransformerConfig, file: Path) -> TransformerConfig:
    """The config with all tokens that end a text: those of config.json and of
    generation_config.json; none if the latter has an empty list."""
    if not file.exists():
        return config
    stated = read_json(file).get("eos_token_id")
    try:
        ids = parse_token_ids(stated, "eos_token_id")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if stated == []:
        return dataclasses.replace(config, eos_token_ids=())
    together = dict.fromkeys((*config.eos_token_ids, *ids))
    return dataclasses.replace(config, eos_token_ids=tuple(together))


def load_params(
    folder: Path,
    config: TransformerConfig,
    mesh: Mesh | None = None,
    *,
    head: bool = True,
    progress: bool | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Params:
    """Reads the weights onto a mesh, in ``config.dtype`` or as int8 with ``config.quantise``;
    each device gets only its slices.

    Every tensor is checked by name, shape and the size of its file before the first is read.

    Args:
      config: of :func:`read_config`, which checks whether the files contain a separate head.
      head: False leaves out what comes after the layers (final norm and output head), whether
        or not the folder has it.
      progress: show a progress bar; None shows it if stderr is a terminal.
      chunk_bytes: how much of a parameter is in host memory at once.

    Raises:
      ValueError: missing, unexpected or misshaped tensors, all listed; damaged files.
    """
    mesh = mesh or single_device_mesh()
    family = family_of(config)
    table = family.param_table(config)
    tensors = named_tensors(folder, config)
    shapes = lambda rows: {
        name: r.hf_shape(config, at) for r in rows for at, name in r.tensor_names(config)
    }
    every_shape = shapes(table)
    shardings = param_shardings(table, config, mesh)
    if not head:
        table = [row for row in table if row.stacked or row.path[0] in BELOW_THE_LAYERS]
    expected = shapes(table)
    _check_tensors(tensors, expected, every_shape.keys() - expected.keys(), config, folder)
    total = count_params(table, config) * array_dtype(config).itemsize
    bar = tqdm(
        desc=f"loading {folder.name}",
        total=total,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if progress is None else not progress,
    )
    reader = ParamReader(tensors, config, on_bytes=bar.update, chunk_bytes=chunk_bytes)
    with bar, contextlib.closing(reader):
        return build_tree(
            (row.path, _load(reader, row, config, leaf(shardings, row.path))) for row in table
        )


def _load(
    reader: ParamReader,
    row: ParamRow,
    config: TransformerConfig,
    sharding: NamedSharding | Int8Matrix,
) -> jax.Array | Int8Matrix:
    if not isinstance(sharding, Int8Matrix):
        return reader.load(row, sharding)
    inputs = tuple(axis for axis, dim in enumerate(row.scale_dims) if dim == "1")
    finish = jax.jit(quantise, static_argnums=1, out_shardings=sharding)
    return reader.load(row, sharding.values, lambda part: finish(part, inputs))


def weights_fingerprint(folder: Path) -> str:
    """A hash that identifies a model and is cheap at any size: sha256 over each file's header, its
    size, and the first and last 4 KiB of every tensor. Training changes all of a tensor; a change
    only in the middle of a large one would go unnoticed. If several files contain a tensor, the
    hash includes which one the index names."""
    digest, seen, twice = hashlib.sha256(), set(), set()
    for file in weight_files(folder):
        with open(file, "rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = stream.read(header_size)
            digest.update(header)
            digest.update(file.stat().st_size.to_bytes(8, "little"))
            entries = json.loads(header)
            names = entries.keys() - {"__metadata__"}
            twice |= seen & names
            seen |= names
            for name in sorted(names):
                start, stop = (8 + header_size + o for o in entries[name]["data_offsets"])
                for offset in (start, max(start, stop - _FINGERPRINT_BYTES)):
                    stream.seek(offset)
                    digest.update(stream.read(min(_FINGERPRINT_BYTES, stop - offset)))
    read_from = indexed_files(folder) if twice else {}
    for name in sorted(twice & read_from.keys()):
        digest.update(f"{name}: {read_from[name]}\n".encode())
    return digest.hexdigest()


def _check_tensors(
    tensors: TensorFiles,
    expected: Mapping[str, tuple[int, ...]],
    not_wanted: Set[str],
    config: TransformerConfig,
    folder: Path,
) -> None:
    # Equal to the embedding, or the config would not be a tied one: see with_stored_head.
    tied_copy = {end_names(config)[1]} if config.tied_embeddings else set()
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in tensors]
    problems += [
        f"unexpected: {name} {tensor.shape}"
        for name, tensor in tensors.items()
        if name not in expected and name not in tied_copy | not_wanted
    ]
    problems += [
        f"misshaped: {name} is {tensors[name].shape}, by config.json {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [
        f"unreadable: {name} is stored as {tensors[name].dtype}, not {', '.join(FLOATS)}"
        for name in expected
        if name in tensors and tensors[name].dtype not in FLOATS
    ]
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems[:40])
        more = f"\n  … and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise ValueError(
            f"model.path={folder}: the tensors do not fit config.json:\n{listing}{more}"
        )
