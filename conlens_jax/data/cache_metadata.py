"""Metadata of an activation cache, and whether it matches the requested settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conlens_jax.data.rows import ACTIVATION_DTYPES
from conlens_jax.files.paths import local_path

SCHEMA_VERSIONS = (1, 2)
"""Version 2 has targets; a cache without them is written as version 1."""
METADATA_FILE = "metadata.json"

# Where the user changes each setting.
_CONFIG_NAMES = {
    "model_id": "model.path",
    "weights_hash": "model.path (hash of the weights)",
    "tokenizer_hash": "tokenizer (hash)",
    "layer": "model.layer",
    "d_model": "model.path (d_model)",
    "seq_len": "dump.seq_len",
    "dtype": "dump.dtype",
    "seed": "dump.seed",
    "target.text_len": "lens.text_len",
    "target.end_token": "lens.end_token",
}


class CacheError(ValueError):
    """The cache cannot be used; the message lists every problem and its fix."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard file. ``cursor`` is the caller's cursor of the last row in it."""

    file: str
    rows: int
    n_bytes: int
    sha256: str
    cursor: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheMetadata:
    """Contents of a cache. All but ``n_rows`` and ``shards`` are settings, known before the dump.

    Attributes:
      model_id: the model's name; weights_hash and tokenizer_hash identify its content.
      layer: 0-based block whose output the activations are.
      dtype: ``"float32"`` or ``"bfloat16"``, of the activations on disk.
      corpus, dump: settings that determine the rows, as plain JSON values. Leave out settings that
        do not change the rows (such as a folder's name): a difference prevents resuming.
      target: settings of the rows' targets; empty without them.
    """

    model_id: str
    weights_hash: str
    tokenizer_hash: str
    layer: int
    d_model: int
    seq_len: int
    dtype: str
    corpus: Mapping[str, Any]
    split: str
    dump: Mapping[str, Any]
    seed: int
    n_rows: int = 0
    shards: tuple[Shard, ...] = ()
    target: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schema_version: int = 1

    def __post_init__(self):
        object.__setattr__(self, "schema_version", 2 if self.target else 1)
        if self.dtype not in ACTIVATION_DTYPES:
            raise ValueError(
                f"dump.dtype must be one of {', '.join(ACTIVATION_DTYPES)}, not {self.dtype!r}"
            )

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        if not self.target:
            del values["target"]
        return json.dumps(values, indent=1, sort_keys=True, default=to_plain)

    @classmethod
    def from_json(cls, text: str, source: str = METADATA_FILE) -> CacheMetadata:
        """Raises :class:`CacheError` on another schema version, or unknown or missing keys."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise CacheError(f"{source} is not valid JSON ({error}); dump again") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version not in SCHEMA_VERSIONS:
            raise CacheError(
                f"{source} has schema_version {version!r}, but this version of conlens_jax reads "
                "1 and 2: dump again, or read it with the version that wrote it"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if version == 1:
            names.remove("target")
        problems = [f"unknown key {name!r}" for name in sorted(values.keys() - names)]
        problems += [f"missing key {name!r}" for name in sorted(names - values.keys())]
        if problems:
            raise CacheError(f"{source}: {'; '.join(problems)}")
        try:
            shards = tuple(Shard(**shard) for shard in values["shards"])
        except TypeError as error:
            raise CacheError(f"{source}: a malformed shard entry ({error}); dump again") from error
        return cls(**{**values, "shards": shards})

    def differences(self, asked: CacheMetadata) -> list[str]:
        """One line for each setting that differs from ``asked``."""
        found, wanted = _flat_settings(self), _flat_settings(asked)
        if self.weights_hash and self.weights_hash == asked.weights_hash:
            # The same weights in a folder with another name are the same model.
            del found["model_id"], wanted["model_id"]
        absent = "nothing"
        return [
            f"{_CONFIG_NAMES.get(name, name)}: the cache has {found.get(name, absent)!r}, "
            f"asked for is {wanted.get(name, absent)!r}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name, absent) != wanted.get(name, absent)
        ]


def to_plain(value: Any) -> Any:
    """``default`` of ``json.dumps``: NumPy scalars become Python numbers."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be written as JSON")


def _flat_settings(metadata: CacheMetadata) -> dict[str, Any]:
    values = json.loads(metadata.to_json())
    del values["n_rows"], values["shards"], values["schema_version"]
    for section in ("corpus", "dump", "target"):
        fields = values.pop(section, {})
        values |= {f"{section}.{name}": value for name, value in fields.items()}
    return values


def cache_is_complete(folder: str | Path, metadata: CacheMetadata) -> bool:
    """Whether ``folder`` is a finished cache with these settings.

    Raises:
      CacheError: the folder is a cache with other settings, or not a cache. It is never
        overwritten.
    """
    folder = local_path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / METADATA_FILE).is_file():
        raise CacheError(
            f"{folder} exists and is not an activation cache (no {METADATA_FILE}); "
            "change dump.cache_dir"
        )
    source = str(folder / METADATA_FILE)
    found = CacheMetadata.from_json((folder / METADATA_FILE).read_text(), source)
    raise_on_other_settings(folder, found, metadata)
    return True


def raise_on_other_settings(folder: Path, found: CacheMetadata, asked: CacheMetadata) -> None:
    lines = found.differences(asked)
    if lines:
        raise CacheError(
            f"{folder} was written with other settings; delete the folder or change "
            "dump.cache_dir:\n" + "\n".join(f"  - {line}" for line in lines)
        )


def check_metadata(metadata: CacheMetadata, folder: str, **expected: Any) -> None:
    """Compares a cache's metadata with the caller's settings (None: not compared).

    Equal weight hashes mean the same model, even under another name. Fields that an older cache
    does not record (empty, or a negative layer) are not compared, nor are targets that the caller
    does not use (``target`` empty).

    Raises:
      CacheError: there are mismatches; all are listed, with the fix.
    """
    if expected.get("weights_hash") and metadata.weights_hash == expected["weights_hash"]:
        expected.pop("model_id", None)
    lines = list(_target_differences(metadata.target, expected.pop("target", None) or {}))
    for name, wanted in expected.items():
        found = getattr(metadata, name)
        unknown = found == "" or (name == "layer" and found < 0)
        if wanted is not None and not unknown and found != wanted:
            lines.append(f"{_CONFIG_NAMES[name]}: the cache has {found!r}, this run has {wanted!r}")
    if lines:
        raise CacheError(
            f"the activation cache {folder} does not fit this run; dump again or point "
            "dump.cache_dir elsewhere:\n" + "\n".join(f"  - {line}" for line in lines)
        )


def _target_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    # Targets of another kind have other settings.
    same_kind = found.get("kind") == wanted.get("kind")
    for name, value in wanted.items():
        if found.get(name) != value and (same_kind or name == "kind"):
            field = _CONFIG_NAMES.get(f"target.{name}", f"target.{name}")
            kept = repr(found.get(name)) if found else "no targets"
            yield f"{field}: the cache has {kept}, this run has {value!r}"
