"""Reads single files of legacy activation caches; see :mod:`conlens_jax.data.legacy`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conlens_jax.data.cache_metadata import METADATA_FILE, CacheError

TOKEN_COLUMNS = ("token_ids_prefix", "input_ids", "token_ids", "tokens")
_POSITION_COLUMNS = ("token_position", "token_pos", "position")
_LAYER_COLUMNS = ("activation_layer", "layer_index", "layer")
_MAX_PROBLEMS_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class LegacyRow:
    """One activation of a legacy cache.

    Attributes:
      activation_D: float32.
      tokens: int32, without padding; empty if the file has no tokens.
      layer: 0-based block whose output it is; -1 if the file does not record it.
    """

    activation_D: np.ndarray
    tokens: np.ndarray
    position: int
    document: int
    layer: int


@dataclasses.dataclass(frozen=True)
class FilePart:
    """A unit of reading: a ``.pt`` file, or one row group of a parquet file."""

    path: Path
    group: int | None = None


def pt_files(folder: Path) -> list[Path]:
    """All ``.pt`` files in a folder and its subfolders."""
    return sorted(folder.rglob("*.pt"))


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files in a folder, or the file itself."""
    if folder.is_file() and folder.suffix == ".parquet":
        return [folder]
    return sorted(folder.glob("*.parquet"))


def parquet_parts(paths: Iterable[Path]) -> Iterator[FilePart]:
    """The row groups of parquet files."""
    import pyarrow.parquet as pq

    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield FilePart(path, group)


def raise_problems(folder: Path, problems: Sequence[str]) -> None:
    """Raises one :class:`CacheError` that lists all problems, if there are any."""
    if problems:
        shown = [f"  - {problem}" for problem in problems[:_MAX_PROBLEMS_SHOWN]]
        if len(problems) > len(shown):
            shown.append(f"  … and {len(problems) - len(shown)} more")
        raise CacheError(f"{folder} cannot be read as an activation cache:\n" + "\n".join(shown))


def recorded_by_shards(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """The settings in the ``metadata.json`` of ``.pt`` shards, if there is one.

    Raises:
      CacheError: listed shards are missing.
    """
    if not (folder / METADATA_FILE).is_file():
        return {}
    content = json.loads((folder / METADATA_FILE).read_text())
    # Each process wrote to its own folder, but recorded only file names.
    present = {path.name for path in paths}
    missing = [
        f"{shard['name']}: named in {METADATA_FILE} but missing"
        for shard in content.get("shards", [])
        if Path(shard["name"]).name not in present
    ]
    raise_problems(folder, missing)
    config = content.get("config", {})
    return {
        "model": config.get("model_name"),
        "corpus": config.get("hf_dataset_name"),
        "split": config.get("split_name"),
        "seed": config.get("seed"),
        "layer": int(config["layer_idx"]) - 1 if "layer_idx" in config else None,
    }


def recorded_by_sidecar(path: Path) -> dict[str, Any]:
    """The settings in the ``.nla_meta.yaml`` beside a parquet file, if there is one.

    Raises:
      CacheError: the activations were normalised.
    """
    import yaml

    names = (f"{path.name}.nla_meta.yaml", f"{path.stem}.nla_meta.yaml")
    for name in (*names, ".nla_meta.yaml", "nla_meta.yaml"):
        sidecar = path.with_name(name)
        if sidecar.is_file():
            content = yaml.safe_load(sidecar.read_text()) or {}
            extraction = {**content, **(content.get("extraction") or {})}
            if extraction.get("norm") not in (None, "none"):
                raise CacheError(
                    f"{sidecar} has norm: {extraction['norm']!r}; a lens needs raw activations "
                    "(norm: none)"
                )
            return {
                "model": extraction.get("base_model"),
                "d_model": extraction.get("d_model"),
                "corpus": extraction.get("corpus"),
                "layer": extraction.get("layer_index", extraction.get("extraction_layer_index")),
            }
    return {}


def read_part(part: FilePart, pad_id: int | None) -> list[LegacyRow]:
    """The rows of one part.

    Raises:
      CacheError: the file cannot be loaded, keys are missing, positions are outside their
        context, or activations are not finite; the file is named.
    """
    is_pt = part.path.suffix == ".pt"
    rows = list(_pt_rows(part.path, pad_id) if is_pt else _parquet_rows(part))
    overflown = sum(not np.isfinite(row.activation_D).all() for row in rows)
    if overflown:
        raise CacheError(
            f"{part.path.name}: {overflown} activations are not finite (float16, which these "
            "caches used, ends at 65504); dump again"
        )
    return rows


# --- .pt ----------------------------------------------------------------------------------------


def _load_pt(path: Path) -> list[Mapping[str, Any]]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch has no common class for wrong, truncated and unsafe files.
    except Exception as error:
        raise CacheError(f"{path.name}: torch.load(weights_only=True) failed: {error}") from error
    samples = content if isinstance(content, list) else [content]
    if not all(isinstance(sample, dict) for sample in samples):
        raise CacheError(f"{path.name}: neither a sample (dict) nor a list of samples")
    return samples


def _pt_rows(path: Path, pad_id: int | None) -> Iterator[LegacyRow]:
    problems = []
    for number, sample in enumerate(_load_pt(path)):
        layer = int(sample["layer_idx"]) - 1 if sample.get("layer_idx") is not None else -1
        for suffix in ("", "_prime") if sample.get("A_prime") is not None else ("",):
            keys = (f"A{suffix}", f"input_ids_A{suffix}", f"token_pos_A{suffix}")
            missing = [key for key in keys if sample.get(key) is None]
            if missing:
                problems.append(f"sample {number} lacks {', '.join(missing)}")
                continue
            activation, tokens, position = (sample[key] for key in keys)
            # torch's float() first: NumPy cannot read a torch bfloat16.
            activation_D = activation.detach().float().numpy()
            tokens = np.asarray(tokens, np.int32).reshape(-1)
            position = int(position)
            if activation_D.size != activation_D.shape[-1]:
                problems.append(f"sample {number}: {keys[0]} has shape {activation_D.shape}")
            elif not 0 <= position < len(tokens):
                problems.append(
                    f"sample {number}: {keys[2]}={position} outside its {len(tokens)} tokens"
                )
            else:
                tokens = _without_padding(tokens, position, pad_id)
                yield LegacyRow(
                    activation_D.reshape(-1), tokens, position, _hash(tokens.tobytes()), layer
                )
    if problems:
        raise CacheError(f"{path.name}: {'; '.join(problems[:_MAX_PROBLEMS_SHOWN])}")


def _without_padding(tokens: np.ndarray, position: int, pad_id: int | None) -> np.ndarray:
    if pad_id is None:
        return tokens
    # P itself is kept even if it is the padding token (often the end-of-text token).
    true = np.flatnonzero(tokens != pad_id)
    return tokens[: max(position, true[-1] if true.size else 0) + 1]


def _hash(content: bytes) -> int:
    """A document id for files without one: the same context has the same id."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


# --- parquet ------------------------------------------------------------------------------------


def _parquet_rows(part: FilePart) -> Iterator[LegacyRow]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(part.path) as file:
        names = file.schema_arrow.names
        if "activation_vector" not in names:
            raise CacheError(f"{part.path.name}: no column activation_vector, only {names}")
        tokens_name, position_name, layer_name = (
            next((name for name in candidates if name in names), None)
            for candidates in (TOKEN_COLUMNS, _POSITION_COLUMNS, _LAYER_COLUMNS)
        )
        wanted = ["activation_vector", tokens_name, position_name, layer_name, "doc_id"]
        table = file.read_row_group(part.group, columns=[name for name in wanted if name in names])
    activations_ND = _vectors(table["activation_vector"], part)

    def column(name: str | None) -> list[Any]:
        known = name is not None and name in names
        return table[name].to_pylist() if known else [None] * len(activations_ND)

    problems = []
    columns = (column(name) for name in (tokens_name, position_name, layer_name, "doc_id"))
    for number, (tokens, position, layer, document) in enumerate(zip(*columns, strict=True)):
        tokens = np.asarray(tokens or [], np.int32)
        if tokens_name == "token_ids_prefix" or (position is None and tokens_name):
            position = len(tokens) - 1  # the context ends with P
        if tokens_name and not 0 <= position < len(tokens):
            problems.append(f"row {number}: position {position} outside its {len(tokens)} tokens")
            continue
        if not isinstance(document, int):
            document = _hash(tokens.tobytes() if document is None else str(document).encode())
        layer = -1 if layer is None else int(layer)
        yield LegacyRow(activations_ND[number], tokens, int(position or 0), document, layer)
    if problems:
        raise CacheError(f"{part.path.name}: {'; '.join(problems[:_MAX_PROBLEMS_SHOWN])}")


def _vectors(column: Any, part: FilePart) -> np.ndarray:
    """A column of equally long lists as float32 ``[N, D]``, without Python objects."""
    import pyarrow.compute as pc

    widths = set(pc.list_value_length(column).unique().to_pylist())
    if len(widths) > 1 or None in widths:
        raise CacheError(
            f"{part.path.name}: activation_vector has lengths {sorted(map(str, widths))} in row "
            f"group {part.group}"
        )
    if not widths:
        return np.zeros((0, 0), np.float32)
    flat = pc.list_flatten(column).to_numpy()
    return flat.astype(np.float32).reshape(len(column), widths.pop())
