"""A lens as a Hugging Face folder: ``config.json``, the trained parts as safetensors, a model card.

config.json               the shape of the lens, its model (id and hash of the weights), what the
                          training rows had, and the calibration of its claims
decoder.safetensors       trained parts, named by their path in the tree
encoder.safetensors
metrics.json, README.md   the evaluation's numbers, and the model card that shows them
model/                    the language model, if it has no hub id
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from conlens_jax.config import LensConfig, ModelConfig
from conlens_jax.config.dtypes import run_dtype
from conlens_jax.config.older import updated_lens
from conlens_jax.evaluation.support import Calibration
from conlens_jax.files.whole import naming_full_disk, write_atomically, write_whole
from conlens_jax.inspection.card import model_card
from conlens_jax.inspection.parts import LensParts
from conlens_jax.lens.saved import (
    CONFIG,
    FINISHED,
    KIND,
    METRICS,
    MODEL_FOLDER,
    SIDES,
    is_hub_id,
    is_saved_lens,
    put_in_place,
    read_json,
)
from conlens_jax.measurement.training_range import TrainingRange
from conlens_jax.models.from_gguf.source import PACKAGED
from conlens_jax.models.param_table import named_leaves

_UNFINISHED = ".unfinished-lens"
_NOT_COPIED = (".bin", ".pt", ".py")
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of ``config.json``.

    Attributes:
      model: which model, and how it is run.
      model_id: its name; weights_hash: of the weights that the lens was trained on.
      lens: shape of the lens.
      statistics: ``mean`` [D] and ``scale`` of the training activations.
      add_bos: whether texts begin with the bos token.
      facts: where the lens comes from.
      metrics: content of ``metrics.json``, if there is one.
      trained_on: what the training rows had; of a lens of an earlier version, the first position.
      calibration: of its claims, if it was measured.
    """

    model: ModelConfig
    model_id: str
    weights_hash: str
    lens: LensConfig
    statistics: Mapping[str, Any]
    add_bos: bool
    facts: dict[str, Any]
    metrics: dict[str, Any]
    trained_on: TrainingRange
    calibration: Calibration | None


def save(
    lens: LensParts, folder: Path, include_model: bool | None = None, dtype: str | None = None
) -> Path:
    """Writes the folder; it must be new, empty, or a saved lens, which is then replaced.

    A kill or a full disk leaves the old lens or the new one, never a mixture.

    Args:
      include_model: copy the language model too. None: if others cannot get it by its name.
      dtype: of the trained parts in the files; None: as they are.

    Raises:
      ValueError: the folder contains something else, or there is no such dtype.
      OSError: it cannot be written; a full disk is named with the folder.
    """
    others = [] if not folder.exists() else [f for f in folder.iterdir() if f.name != _UNFINISHED]
    if others and not is_saved_lens(folder):
        raise ValueError(f"{folder} contains something that is no lens; choose another folder")
    stored_dtype = None if dtype is None else np.dtype(run_dtype(dtype))
    if include_model is None:
        include_model = not _has_name(lens.model.model_id)
    unfinished = folder / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with naming_full_disk(folder / "the lens"):
            unfinished.mkdir(parents=True)
            _write_parts(lens, unfinished, include_model, stored_dtype)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    unfinished.rename(folder / FINISHED)
    put_in_place(folder)
    return folder


def _write_parts(
    lens: LensParts, folder: Path, include_model: bool, dtype: np.dtype | None
) -> None:
    for side in SIDES:
        leaves = named_leaves(jax.device_get(lens.trainable[side]))
        tensors = {name: np.asarray(leaf, dtype) for name, leaf in leaves.items()}
        write_atomically(folder / f"{side}.safetensors", [safetensors.numpy.save(tensors)])
    model = folder / MODEL_FOLDER
    model.mkdir()  # if it stays empty, it only replaces an older one
    if include_model:
        for file in lens.model.folder.rglob("*"):
            if file.is_file() and file.suffix not in _NOT_COPIED:
                copy = model / file.relative_to(lens.model.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)
    _write(folder / METRICS, lens.metrics)
    _write(folder / CONFIG, _config(lens))
    write_whole(folder / "README.md", model_card(lens, include_model))


def _has_name(model_id: str) -> bool:
    """Whether a model is found by its name on any machine: a hub id, or one of the package
    registry's."""
    return model_id in PACKAGED or is_hub_id(model_id)


def _config(lens: LensParts) -> dict[str, Any]:
    shape, statistics = lens.spec.model, lens.frozen["statistics"]
    settings = ModelConfig(
        # A lens that is saved without its model loads the model from here.
        path=lens.model.model_id if _has_name(lens.model.model_id) else str(lens.model.folder),
        revision=lens.model.revision,
        layer=lens.spec.layer,
        dtype=shape.dtype,
        unroll=shape.unroll,
        attention=shape.attention,
        quantise=shape.quantise,
    )
    return {
        "model_type": KIND,
        "format": FORMAT,
        "model": dataclasses.asdict(settings),
        "model_id": lens.model.model_id,
        "weights_hash": lens.model.weights_hash,
        "lens": dataclasses.asdict(lens.spec.lens),
        "statistics": {
            "mean": np.asarray(statistics["mean"]).tolist(),
            "scale": float(statistics["scale"]),
        },
        "add_bos": lens.add_bos,
        "facts": lens.facts,
        "trained_on": lens.trained_on.to_json(),
        **({} if lens.calibration is None else {"support": lens.calibration.to_json()}),
    }


def _write(file: Path, values: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(values, indent=2) + "\n")


def read_record(folder: Path) -> Record:
    """Reads ``config.json``. Raises ValueError if it is not one that :func:`save` writes."""
    values = read_json(folder / CONFIG)
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{folder}/config.json has format {values.get('format')!r}; this version of "
            f"conlens_jax reads {FORMAT}"
        )
    metrics = folder / METRICS
    try:
        return Record(
            model=ModelConfig(**values["model"]),
            model_id=values["model_id"],
            weights_hash=values["weights_hash"],
            lens=LensConfig(**updated_lens(values["lens"])),
            statistics=values["statistics"],
            add_bos=values["add_bos"],
            facts=values["facts"],
            metrics=read_json(metrics) if metrics.is_file() else {},
            trained_on=TrainingRange.from_json(values.get("trained_on", values["facts"])),
            calibration=Calibration.from_json(values["support"], folder / CONFIG)
            if "support" in values
            else None,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json describes no lens: {error!r}") from error


def push(lens: LensParts, repo_id: str, private: bool, **save_options: Any) -> str:
    """Uploads what :func:`save` writes and returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(lens, Path(folder), **save_options)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="A consistency lens"
        )
    return str(getattr(commit, "commit_url", commit))
