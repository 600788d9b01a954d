"""Where a run's model and activations are: recorded with each checkpoint, so that they are found
again after the corpus or a branch on the hub has changed, or the folders have moved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conlens_jax.config import (
    EMBEDDED_MODEL,
    ConfigError,
    ExperimentConfig,
    to_json_dict,
)
from conlens_jax.data.cache_metadata import METADATA_FILE
from conlens_jax.embedded.language_model import cache_root, ensure_language_model
from conlens_jax.files.paths import local_path
from conlens_jax.models.hf_io import weights_fingerprint
from conlens_jax.models.model import LanguageModel
from conlens_jax.tracking.console import Console
from conlens_jax.training.checkpoint import any_metadata

Metadata = Mapping[str, Any]


def places_of(config: ExperimentConfig, model: LanguageModel, run: Path) -> dict[str, Any]:
    """The folders that a checkpoint's metadata records, as JSON values."""
    cache = local_path(config.dump.cache_dir)
    uses_cache = config.data.source == "cache"
    return {
        "run": str(run),
        "model": str(model.folder),
        "model_revision": model.revision,
        "cache": str(cache) if uses_cache else "",
        "cache_identity": cache_identity(cache) if uses_cache else "",
    }


def cache_identity(cache: Path) -> str:
    """A hash over the hashes of all shards; empty if these are not recorded, as in caches of
    earlier systems."""
    files = [cache / split / METADATA_FILE for split in ("train", "validation")]
    try:
        shards = [json.loads(file.read_text(encoding="utf-8"))["shards"] for file in files]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


def metadata_of_run(run: Path | None) -> Metadata:
    """The metadata of a run's checkpoints; empty if it has none."""
    return {} if run is None else any_metadata(run / "checkpoints")


def _moved_with(run: Path, metadata: Metadata, name: str) -> Iterator[Path]:
    """The candidates for a recorded folder: moved together with the run, and where it was."""
    places = metadata.get("places", {})
    if places.get(name):
        yield Path(os.path.normpath(run / os.path.relpath(places[name], places["run"])))
        yield Path(places[name])


# --- the model ----------------------------------------------------------------------------------


def model_place(
    config: ExperimentConfig, metadata: Metadata, run: Path, console: Console
) -> tuple[str, str]:
    """(folder or hub id, revision) of the model that a run was trained on.

    The recorded folder if it contains these weights, else the config's. The corpus is opened only
    if an embedded model has to be trained again.

    Raises:
      ValueError: an embedded model is not found, and its corpus cannot be read.
    """
    expected = metadata["weights_hash"]
    if folder := recorded_model(config, metadata, run):
        return str(folder), ""
    if config.model.path != EMBEDDED_MODEL:
        places = metadata.get("places", {})
        return config.model.path, places.get("model_revision") or config.model.revision
    try:
        return str(ensure_language_model(config, console)), ""
    except ValueError as error:
        tried = [*_moved_with(run, metadata, "model"), cache_root(config.embedded)]
        raise ConfigError(
            f"the embedded model of {run} (weights {expected[:12]}) is not in "
            f"{', '.join(map(str, dict.fromkeys(tried)))}, and cannot be trained again: "
            f"{error}"
        ) from error


def recorded_model(config: ExperimentConfig, metadata: Metadata, run: Path) -> Path | None:
    """The folder with the weights that a run was trained on, or None if it is not found."""
    folders = _model_folders(config, metadata, run)
    return next((f for f in folders if _fingerprint(f) == metadata["weights_hash"]), None)


def _model_folders(config: ExperimentConfig, metadata: Metadata, run: Path) -> Iterator[Path]:
    yield from _moved_with(run, metadata, "model")
    if config.model.path == EMBEDDED_MODEL:
        root = cache_root(config.embedded)
        if root.is_dir():
            yield from sorted(root.glob(f"llama-{config.corpus.kind}-*"))


def _fingerprint(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return ""
    try:
        return weights_fingerprint(folder)
    except (OSError, ValueError):
        return ""


def check_weights(model: LanguageModel, expected: str, what: str) -> None:
    """Raises ConfigError if a model is not the one that ``what`` was trained on."""
    if model.weights_hash != expected:
        raise ConfigError(
            f"model.path: {model.folder} has weights {model.weights_hash[:12]}, and these "
            f"are not the weights that the lens was trained on: {what} records {expected[:12]}"
        )


# --- resuming a run -----------------------------------------------------------------------------

# Paths that may change when a run is resumed, because their contents are compared.
MOVABLE = ("model.path", "model.revision", "embedded.cache_dir", "dump.cache_dir", "corpus.path")


def asks_for_same_model(config: ExperimentConfig, metadata: Metadata) -> bool:
    """Whether a config specifies the model as the run's own config does, so that the run's record
    of it applies. The folders of an embedded model and its corpus do not matter."""
    before = metadata.get("config", {})
    now = to_json_dict(config)
    if now["model"]["path"] != EMBEDDED_MODEL:
        return all(now["model"][name] == before["model"][name] for name in ("path", "revision"))
    same = lambda section, free: {**now[section], free: ""} == {**before[section], free: ""}
    is_embedded = before["model"]["path"] == EMBEDDED_MODEL
    return is_embedded and same("embedded", "cache_dir") and same("corpus", "path")


def with_cache_found(
    config: ExperimentConfig, metadata: Metadata, run: Path, console: Console
) -> ExperimentConfig:
    """The config with the present ``dump.cache_dir`` of the run's cache.

    A ``dump.cache_dir`` other than the run's is the user's choice, and stays.
    """
    identity = metadata.get("places", {}).get("cache_identity")
    given = local_path(config.dump.cache_dir)
    is_chosen = config.dump.cache_dir != metadata.get("config", {}).get("dump", {}).get("cache_dir")
    found = cache_identity(given)
    if not identity or found == identity or (is_chosen and found) or config.data.source != "cache":
        return config
    for folder in _moved_with(run, metadata, "cache"):
        if cache_identity(folder) == identity:
            console.line("cache", found=folder)
            dump = dataclasses.replace(config.dump, cache_dir=str(folder))
            return dataclasses.replace(config, dump=dump)
    return config


def resumption_problems(
    config: ExperimentConfig, metadata: Metadata, model: LanguageModel | None
) -> Iterator[str]:
    """Why a run cannot be resumed with the model, cache and corpus of the config."""
    expected = metadata.get("weights_hash")
    if model is not None and expected and model.weights_hash != expected:
        yield (
            f"model.path: {model.folder} has weights {model.weights_hash[:12]}, and the run was "
            f"started with {expected[:12]}; give that model, or choose another run_dir"
        )
    places = metadata.get("places", {})
    if not places:
        return
    identity = places["cache_identity"]
    given = local_path(config.dump.cache_dir)
    before = metadata["config"]
    is_other = cache_identity(given) != identity or (
        not identity and config.dump.cache_dir != before["dump"]["cache_dir"]
    )
    if config.data.source == "cache" and is_other:
        yield (
            f"dump.cache_dir: {given} is not the cache that the run was started with (it was "
            f"{places['cache']}); give that one, or choose another run_dir"
        )
    corpus = before["corpus"]["path"]
    if config.data.source == "stream" and config.corpus.path != corpus:
        yield (
            f"corpus.path is {config.corpus.path!r}, and was {corpus!r} when the run was started; "
            "choose another run_dir, or give the old value"
        )
