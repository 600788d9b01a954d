"""Where a lens comes from: a run folder, or a saved lens."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from conlens_jax.config import (
    EMBEDDED_MODEL,
    ConfigError,
    ExperimentConfig,
    LensConfig,
    ModelConfig,
    from_config_dict,
)
from conlens_jax.inspection import folder as saved
from conlens_jax.inspection.lens import Lens
from conlens_jax.lens.sharding import lens_shardings
from conlens_jax.lens.spec import init_lens, make_spec
from conlens_jax.models.model import LanguageModel, load_model
from conlens_jax.models.param_table import Params
from conlens_jax.training.checkpoint import all_steps, read_metadata, restore_params
from conlens_jax.training.console import Console
from conlens_jax.training.language_model import ensure_language_model
from conlens_jax.training.run import CHECKPOINT_METRIC
from conlens_jax.training.run_folder import checkpoint_of
from conlens_jax.training.tracking import read_metrics


def load(path_or_hub_id: str | Path, mesh: Mesh, dtype: str | None, step: int | str) -> Lens:
    """See :meth:`Lens.load`."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir() and not saved.is_saved_lens(path):
        return _from_run(path, mesh, dtype, step)
    return _from_saved(saved.resolve(str(path_or_hub_id)), mesh, dtype)


def _from_run(path: Path, mesh: Mesh, dtype: str | None, step: int | str) -> Lens:
    folder, named_step = checkpoint_of(path)
    run = folder.parent
    if named_step is None:
        named_step = _chosen_step(folder, step)
    metadata = read_metadata(folder, named_step)
    config = from_config_dict(metadata["config"])
    model = _model_of_run(config, metadata["weights_hash"], mesh, dtype)
    make_lens = _LensMaker(model, config.model.layer, config.lens, metadata["statistics"], mesh)
    trainable = restore_params(folder, metadata["step"], make_lens.template)
    facts = {
        "model": model.model_id,
        "layer": config.model.layer,
        "stage": metadata["stage"],
        "step": metadata["step"],
        "first_position": config.dump.min_position,
    }
    # The evaluation speaks of the run's last checkpoint.
    file, is_last = run / "metrics.json", metadata["step"] == all_steps(folder)[-1]
    metrics = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and is_last else {}
    add_bos = model.tokenizer.adds_bos(config.dump.add_bos)
    return make_lens(trainable, add_bos, facts, metrics)


def _chosen_step(folder: Path, step: int | str) -> int | None:
    if step == "last":
        return None
    if step != "best":
        return int(step)
    name, log = f"validation_{CHECKPOINT_METRIC}", folder.parent / "metrics.jsonl"
    records = read_metrics(log) if log.is_file() else []
    kept = set(all_steps(folder))
    # The warm start is not judged by its text: only joint checkpoints compete for the best.
    scores = {
        record["step"]: record[name]
        for record in records
        if name in record and record["step"] in kept and record["stage"] != "warm"
    }
    finite = {step: score for step, score in scores.items() if math.isfinite(score)}
    if not finite:
        raise ValueError(f"step='best': no checkpoint in {folder} was validated; use step='last'")
    return min(finite, key=finite.get)


def _model_of_run(
    config: ExperimentConfig, weights_hash: str, mesh: Mesh, dtype: str | None
) -> LanguageModel:
    path, name = config.model.path, config.model.path
    if path == EMBEDDED_MODEL:
        path = str(ensure_language_model(config, Console()))
        name = Path(path).name
    settings = dataclasses.replace(config.model, path=path, dtype=dtype or config.model.dtype)
    return _loaded(settings, name, weights_hash, mesh)


def _loaded(settings: ModelConfig, name: str, weights_hash: str, mesh: Mesh) -> LanguageModel:
    model = load_model(
        settings.path,
        dtype=settings.dtype,
        mesh=mesh,
        revision=settings.revision,
        unroll=settings.unroll,
        attention=settings.attention,
        quantise=settings.quantise,
    )
    if model.weights_hash != weights_hash:
        raise ConfigError(
            [
                f"model.path={settings.path!r}: these are not the weights that the lens was "
                "trained on"
            ]
        )
    return dataclasses.replace(model, model_id=name)


class _LensMaker:
    """The untrained lens around a model: the shapes to restore into, and what is frozen."""

    def __init__(
        self,
        model: LanguageModel,
        layer: int,
        lens: LensConfig,
        statistics: dict[str, Any],
        mesh: Mesh,
    ):
        self.model, self.mesh = model, mesh
        self.spec = make_spec(model.config, layer, lens, model.tokenizer)
        mean_D = np.asarray(statistics["mean"], np.float32)
        trainable, self.frozen = init_lens(model.params, self.spec, mean_D, statistics["scale"])
        shardings = lens_shardings(trainable, model.config, mesh)
        self.template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            trainable,
            shardings,
        )

    def __call__(
        self, trainable: Params, add_bos: bool, facts: dict[str, Any], metrics: dict[str, Any]
    ) -> Lens:
        return Lens(
            self.model, self.spec, trainable, self.frozen, self.mesh, add_bos, facts, metrics
        )


def _from_saved(folder: Path, mesh: Mesh, dtype: str | None) -> Lens:
    record = saved.read_record(folder)
    settings = dataclasses.replace(record.model, dtype=dtype or record.model.dtype)
    if (folder / saved.MODEL_FOLDER).is_dir():
        settings = dataclasses.replace(settings, path=str(folder / saved.MODEL_FOLDER), revision="")
    model = _loaded(settings, record.model_id, record.weights_hash, mesh)
    make_lens = _LensMaker(model, record.model.layer, record.lens, record.statistics, mesh)
    trainable = saved.read_parts(folder, make_lens.template)
    return make_lens(trainable, record.add_bos, record.facts, record.metrics)
