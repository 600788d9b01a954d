"""Reading and writing Hugging Face model folders: config.json, safetensors, no pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (gives numpy the name "bfloat16")
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from conlens_jax.models.families import config_from_hf, family_of
from conlens_jax.models.param_table import ParamRow, Params, build_tree, leaf
from conlens_jax.models.sharding import param_shardings
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.parallel.mesh import single_device_mesh

_READABLE_DTYPES = ("F64", "F32", "F16", "BF16")
# Buffers that old files carry and no model needs.
_BUFFER_ENDINGS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
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
    return config_from_hf(_read_json(folder / "config.json"))


def load_params(folder: Path, config: TransformerConfig, mesh: Mesh | None = None) -> Params:
    """Reads the weights onto a mesh, in ``config.dtype``.

    Every tensor is checked by name and shape before the first is read.

    Raises:
      ValueError: missing, unexpected or misshaped tensors, all listed; damaged files.
    """
    mesh = mesh or single_device_mesh()
    tensors = TensorFiles(folder)
    table = family_of(config).param_table(config)
    _check_tensors(tensors.shapes, table, config, folder)
    shardings = param_shardings(table, config, mesh)

    def read(row: ParamRow) -> jax.Array:
        layers = [
            row.from_hf(tensors.read(name), config).astype(config.dtype)
            for name in row.hf_names(config)
        ]
        whole = np.stack(layers) if row.stacked else layers[0]
        return jax.device_put(whole, leaf(shardings, row.path))

    return build_tree((row.path, read(row)) for row in table)


def save_model(folder: Path, config: TransformerConfig, params: Params) -> None:
    """Writes config.json and model.safetensors, which transformers loads as its own."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for row in family_of(config).param_table(config):
        array = np.asarray(leaf(params, row.path))
        layers = array if row.stacked else [array]
        for name, layer in zip(row.hf_names(config), layers, strict=True):
            tensors[name] = row.to_hf(layer, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(family_of(config).config_to_hf(config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


class TensorFiles:
    """The safetensors files of a folder, seen as one mapping from names to tensors.

    Raises:
      ValueError: no safetensors, an incomplete index, or a damaged file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = _weight_files(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            with _open(file) as handle:
                for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    piece = handle.get_slice(name)
                    if piece.get_dtype() not in _READABLE_DTYPES:
                        raise ValueError(
                            f"{file}: tensor {name} is stored as {piece.get_dtype()}; "
                            f"only {', '.join(_READABLE_DTYPES)} can be read"
                        )
                    self.shapes[name] = tuple(piece.get_shape())
                    self._file_of[name] = file

    def read(self, name: str) -> np.ndarray:
        with _open(self._file_of[name]) as handle:
            return handle.get_tensor(name)


def weights_fingerprint(folder: Path) -> str:
    """A hash that tells models apart and is cheap for any size: sha256 over each file's header, its
    size, and the first and last 4 KiB of every tensor. Training changes all of a tensor; a change
    in the middle of a large one alone would go unseen."""
    digest = hashlib.sha256()
    for file in _weight_files(folder):
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


def _weight_files(folder: Path) -> list[Path]:
    """As transformers chooses them: one whole file, or else what the index names. Adapters and
    other layouts often lie beside them."""
    whole = folder / "model.safetensors"
    if whole.exists():
        return [whole]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)]
    hint = f"; {', '.join(pickled)} is pickled and is not read: convert it" if pickled else ""
    raise ValueError(f"model.path={folder}: there is no .safetensors file{hint}")


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from error


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model.path={file.parent}: there is no {file.name}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None


def _check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    table: list[ParamRow],
    config: TransformerConfig,
    folder: Path,
) -> None:
    expected = {name: row.hf_shape(config) for row in table for name in row.hf_names(config)}
    tied_copy = {"lm_head.weight"} if config.tied_embeddings else set()
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in shapes]
    problems += [
        f"unexpected: {name} {shape}"
        for name, shape in shapes.items()
        if name not in expected and name not in tied_copy and not name.endswith(_BUFFER_ENDINGS)
    ]
    problems += [
        f"misshaped: {name} is {shapes[name]}, config.json says {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
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
