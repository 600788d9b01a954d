"""Loading a lens from a run folder or a saved lens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from conlens_jax.config import (
    EMBEDDED_MODEL,
    DumpConfig,
    ExperimentConfig,
    LensConfig,
    ModelConfig,
    from_config_dict,
)
from conlens_jax.config.dtypes import run_dtype
from conlens_jax.evaluation.support import Calibration
from conlens_jax.files.paths import local_path
from conlens_jax.inspection.folder import read_record
from conlens_jax.inspection.parts import LensParts
from conlens_jax.lens import saved
from conlens_jax.lens.sharding import lens_shardings
from conlens_jax.lens.spec import init_lens, make_spec
from conlens_jax.measurement.metric_files import MEASURED_STEP
from conlens_jax.measurement.training_range import TrainingRange
from conlens_jax.models.model import LanguageModel, load_model
from conlens_jax.models.param_table import Params
from conlens_jax.tracking.console import Console
from conlens_jax.training.checkpoint import all_steps, read_metadata, restore_params
from conlens_jax.training.places import Metadata, check_weights, model_place
from conlens_jax.training.run_folder import chosen_checkpoint


def load(path_or_hub_id: str | Path, mesh: Mesh, dtype: str | None, step: int | str) -> LensParts:
    """The parts of a lens; see :meth:`conlens_jax.inspection.lens.Lens.load`."""
    dtype = None if dtype is None else run_dtype(dtype)
    path = local_path(path_or_hub_id)
    if path.is_dir() and not saved.is_saved_lens(path):
        return _from_run(path, mesh, dtype, step)
    return _from_saved(saved.resolve(str(path_or_hub_id)), mesh, dtype)


def _from_run(path: Path, mesh: Mesh, dtype: str | None, step: int | str) -> LensParts:
    folder, step = chosen_checkpoint(path, step)
    run = folder.parent
    metadata = read_metadata(folder, step)
    config = from_config_dict(metadata["config"])
    model = _model_of_run(config, metadata, run, mesh, dtype)
    make_lens = _LensMaker(model, config.model.layer, config.lens, metadata["statistics"], mesh)
    trainable = restore_params(folder, step, make_lens.template)
    facts = {
        "model": model.model_id,
        "layer": config.model.layer,
        "stage": metadata["stage"],
        "step": metadata["step"],
        "first_position": config.dump.min_position,
    }
    file = run / "metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # Metrics that name no step are those of the last checkpoint.
    if metrics.get(MEASURED_STEP, all_steps(folder)[-1]) != step:
        metrics = {}
    return make_lens(
        trainable,
        add_bos=model.tokenizer.adds_bos(config.dump.add_bos),
        facts=facts,
        metrics=metrics,
        trained_on=_trained_on(config.dump, metadata),
        calibration=Calibration.of_step(run, step),
    )


def _trained_on(dump: DumpConfig, metadata: Metadata) -> TrainingRange:
    if recorded := metadata.get("trained_on"):
        return TrainingRange.from_json(recorded)
    # A run of an earlier version: the positions that its rows could have.
    last = dump.max_position or dump.seq_len - 1 - dump.after
    return TrainingRange(dump.min_position, last)


def _model_of_run(
    config: ExperimentConfig, metadata: Metadata, run: Path, mesh: Mesh, dtype: str | None
) -> LanguageModel:
    path, revision = model_place(config, metadata, run, Console())
    is_embedded = config.model.path == EMBEDDED_MODEL
    settings = dataclasses.replace(
        config.model, path=path, revision=revision, dtype=dtype or config.model.dtype
    )
    model = _loaded(settings, metadata["weights_hash"], str(run), mesh)
    recorded = metadata.get("places", {}).get("model_revision", "")
    return dataclasses.replace(
        model,
        model_id=Path(path).name if is_embedded else config.model.path,
        revision=model.revision or recorded,
    )


def _loaded(settings: ModelConfig, weights_hash: str, what: str, mesh: Mesh) -> LanguageModel:
    model = load_model(
        settings.path,
        dtype=settings.dtype,
        mesh=mesh,
        revision=settings.revision,
        unroll=settings.unroll,
        attention=settings.attention,
        quantise=settings.quantise,
    )
    check_weights(model, weights_hash, what)
    return model


class _LensMaker:
    """The untrained lens around a model: the template to restore into, and the frozen parts."""

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

    def __call__(self, trainable: Params, **details: Any) -> LensParts:
        """``details``: the other fields of :class:`LensParts`."""
        return LensParts(self.model, self.spec, trainable, self.frozen, self.mesh, **details)


def _from_saved(folder: Path, mesh: Mesh, dtype: str | None) -> LensParts:
    record = read_record(folder)
    settings = dataclasses.replace(record.model, dtype=dtype or record.model.dtype)
    if (folder / saved.MODEL_FOLDER).is_dir():
        settings = dataclasses.replace(settings, path=str(folder / saved.MODEL_FOLDER), revision="")
    model = _loaded(settings, record.weights_hash, str(folder), mesh)
    model = dataclasses.replace(
        model, model_id=record.model_id, revision=model.revision or record.model.revision
    )
    make_lens = _LensMaker(model, record.model.layer, record.lens, record.statistics, mesh)
    trainable = saved.read_parts(folder, make_lens.template)
    return make_lens(
        trainable,
        add_bos=record.add_bos,
        facts=record.facts,
        metrics=record.metrics,
        trained_on=record.trained_on,
        calibration=record.calibration,
    )
