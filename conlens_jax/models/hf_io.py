"""Reading and writing Hugging Face model folders: config.json, safetensors, no pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from conlens_jax.models.families import config_from_hf, family_of
from conlens_jax.models.param_table import ParamRow, Params, build_tree, leaf
from conlens_jax.models.sharding import param_shardings
from conlens_jax.models.tensor_files import FLOATS, TensorFiles, read_json, weight_files
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.parallel.mesh import single_device_mesh

_FINGERPRINT_BYTES = 4096


def resolve_folder(path: str, revision: str = "") -> Path:
    """The local folder of a model: ``path`` itself, or the download of a hub id.

    Raises:
      ValueError: neither a folder nor a hub id that can be had.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"model.path={path!r}: there is no such folder")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", "*token*", "vocab*"]
    try:
        return Path(snapshot_download(path, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise ValueError(
            f"model.path={path!r} is not a folder, and the hub did not give it: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def read_config(folder: Path) -> TransformerConfig:
    """The shape of the model in a folder."""
    return config_from_hf(read_json(folder / "config.json"))


def load_params(folder: Path, config: TransformerConfig, mesh: Mesh | None = None) -> Params:
    """Reads the weights onto a mesh, in ``config.dtype``.

    Every tensor is checked by name and shape before the first is read.

    Raises:
      ValueError: missing, unexpected or misshaped tensors, all listed; damaged files.
    """
    mesh = mesh or single_device_mesh()
    family = family_of(config)
    table = family.param_table(config)
    tensors = TensorFiles(folder)
    expected = {name: row.hf_shape(config) for row in table for _, name in row.tensor_names(config)}
    tensors.take_names_of(family, expected)
    _check_tensors(tensors, expected, config, folder)
    shardings = param_shardings(table, config, mesh)

    def read(row: ParamRow) -> jax.Array:
        whole = np.empty(row.shape(config), config.dtype)
        for index, name in row.tensor_names(config):
            whole[index] = row.view(tensors.array(name), config)
        return jax.device_put(whole, leaf(shardings, row.path))

    return build_tree((row.path, read(row)) for row in table)


def save_model(folder: Path, config: TransformerConfig, params: Params) -> None:
    """Writes config.json and model.safetensors, which transformers loads as its own."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for row in family_of(config).param_table(config):
        array = np.asarray(leaf(params, row.path))
        for index, name in row.tensor_names(config):
            # Rows that are pieces of one tensor write to the same array.
            tensor = tensors.setdefault(name, np.empty(row.hf_shape(config), array.dtype))
            row.view(tensor, config)[...] = array[index]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(family_of(config).config_to_hf(config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def weights_fingerprint(folder: Path) -> str:
    """A hash that tells models apart and is cheap for any size: sha256 over each file's header, its
    size, and the first and last 4 KiB of every tensor. Training changes all of a tensor; a change
    in the middle of a large one alone would go unseen."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with open(file, "rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = stream.read(header_size)
            digest.update(header)
            digest.update(file.stat().st_size.to_bytes(8, "little"))
            entries = json.loads(header)
            for name in sorted(entries.keys() - {"__metadata__"}):
                start, stop = (8 + header_size + o for o in entries[name]["data_offsets"])
                for offset in (start, max(start, stop - _FINGERPRINT_BYTES)):
                    stream.seek(offset)
                    digest.update(stream.read(min(_FINGERPRINT_BYTES, stop - offset)))
    return digest.hexdigest()


def _check_tensors(
    tensors: TensorFiles,
    expected: Mapping[str, tuple[int, ...]],
    config: TransformerConfig,
    folder: Path,
) -> None:
    tied_copy = {"lm_head.weight"} if config.tied_embeddings else set()
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in tensors]
    problems += [
        f"unexpected: {name} {tensor.shape}"
        for name, tensor in tensors.items()
        if name not in expected and name not in tied_copy
    ]
    problems += [
        f"misshaped: {name} is {tensors[name].shape}, config.json says {shape}"
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


def with_execution(
    config: TransformerConfig, *, dtype: str, unroll: int = 0, remat: str = "none"
) -> TransformerConfig:
    """The same model, run in another way."""
    return dataclasses.replace(config, dtype=dtype, unroll=unroll, remat=remat)
