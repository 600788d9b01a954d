"""What entry points open once and check: mesh, model, lens spec, caches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from conlens_jax.config import EMBEDDED_MODEL, ConfigError, ExperimentConfig, lookup
from conlens_jax.corpora.corpus import SPLITS
from conlens_jax.data.cache import ActivationCache
from conlens_jax.data.extract import TEST
from conlens_jax.data.legacy import LegacyCache, open_cache
from conlens_jax.data.rows import Rows, RowSource
from conlens_jax.data.stream import TokenStream, open_stream
from conlens_jax.data.targets.opening import mark_ids, target_settings
from conlens_jax.embedded.language_model import ensure_language_model
from conlens_jax.files.paths import checkpoint_path_problem, local_path
from conlens_jax.lens.objective import Objective
from conlens_jax.lens.spec import LensSpec, make_spec
from conlens_jax.measurement.runner import ActivationStatistics, Measurer, activation_statistics
from conlens_jax.measurement.training_range import TrainingRange, tokens_seen
from conlens_jax.models.from_gguf.source import gguf_source
from conlens_jax.models.hub import resolve_folder
from conlens_jax.models.model import LanguageModel, load_model
from conlens_jax.models.sharding import loading_report
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.parallel.host import use_compilation_cache
from conlens_jax.parallel.mesh import check_batch, make_mesh
from conlens_jax.parallel.processes import broadcast_from_first, first_before_others, together
from conlens_jax.tracking.console import Console
from conlens_jax.training.places import (
    asks_for_same_model,
    metadata_of_run,
    model_place,
    with_cache_found,
)
from conlens_jax.training.preflight import missing_cache

_REFERENCE_ROWS = 16_384


@dataclasses.dataclass(frozen=True)
class Session:
    """The open model, mesh and caches of a run, which training and evaluation share.

    Attributes:
      config: the validated configuration.
      console: for messages.
      mesh: the devices.
      model: the original model, on the mesh.
      spec: shape of the lens.
      objective: static part of the loss.
    """

    config: ExperimentConfig
    console: Console
    mesh: Mesh
    model: LanguageModel
    spec: LensSpec
    objective: Objective

    @functools.cached_property
    def caches(self) -> tuple[RowSource, RowSource]:
        """:func:`open_caches`, once: training and evaluation read the same rows."""
        return open_caches(self)

    @functools.cached_property
    def held_out(self) -> RowSource:
        """The rows of ``evaluate.split``."""
        split = self.config.evaluate.split
        return open_cache_of(self, split) if split == TEST else self.caches[1]

    @functools.cached_property
    def reference(self) -> ActivationStatistics:
        """:func:`training_reference`, once."""
        return training_reference(self.caches[0])

    @functools.cached_property
    def trained_on(self) -> TrainingRange:
        """:func:`training_range`, once."""
        vocab_size = self.model.config.vocab_size
        return training_range(self.caches[0], self.reference.norms, vocab_size)

    def measurer(self, between: Callable[[], None] = lambda: None) -> Measurer:
        """A measurer of this lens; ``between`` is called before each batch."""
        evaluate = self.config.evaluate
        return Measurer(
            self.spec,
            self.mesh,
            horizon=evaluate.kl_horizon,
            batch_size=evaluate.batch_size,
            seed=evaluate.seed,
            between=between,
        )


def open_session(
    config: ExperimentConfig, console: Console, run: str | Path | None = None
) -> Session:
    """Makes the mesh and loads the model; trains the embedded model if the config uses it and it
    does not exist yet.

    Args:
      run: the folder of a run to resume or to measure. The model and the cache that its checkpoints
        record are looked for first, also relative to the run in case it was moved.

    Raises:
      ValueError: a mesh, model or prompt does not fit; with the field and the fix.
    """
    run = None if run is None else local_path(run)
    if run in (None, local_path(config.run_dir)) and (problem := _run_dir_problem(config)):
        raise ConfigError(problem)
    metadata = metadata_of_run(run)
    if metadata:
        config = with_cache_found(config, metadata, run, console)
    use_compilation_cache(config.train.compile_cache)
    mesh = make_mesh(config.mesh)
    check_batches(config, mesh)
    path, revision = config.model.path, config.model.revision
    if metadata and asks_for_same_model(config, metadata):
        with first_before_others("model"):
            path, revision = model_place(config, metadata, run, console)
    elif path == EMBEDDED_MODEL:
        path = _embedded_model(config, console)

    with first_before_others("model files"):
        if gguf_source(path):
            resolve_folder(path)  # converted by one process

    def before_loading(shape: TransformerConfig) -> None:
        check_context(config, shape, path)
        console.table("model", *loading_report(shape, mesh))

    model = load_model(
        path,
        dtype=config.model.dtype,
        mesh=mesh,
        revision=revision,
        unroll=config.model.unroll,
        remat=config.model.remat,
        attention=config.model.attention,
        quantise=config.model.quantise,
        before_loading=before_loading,
    )
    if config.model.path == EMBEDDED_MODEL:
        # The cache records the model by its name in the config, not by a path on this machine.
        model = dataclasses.replace(model, model_id=model.folder.name)
    elif path != config.model.path:
        model = dataclasses.replace(
            model, model_id=config.model.path, revision=metadata["places"]["model_revision"]
        )
    spec = make_spec(model.config, config.model.layer, config.lens, model.tokenizer)
    console.line(
        "model",
        id=model.model_id,
        layers=model.config.n_layers,
        layer=config.model.layer,
        width=model.config.d_model,
        vocabulary=model.config.vocab_size,
        devices=mesh.size,
    )
    return Session(
        config, console, mesh, model, spec, make_objective(config, spec, model.tokenizer)
    )


def make_objective(config: ExperimentConfig, spec: LensSpec, tokenizer: Tokenizer) -> Objective:
    """The static part of the loss; raises ValueError if a mark between words is not one token."""
    ids = mark_ids(config.target, tokenizer)
    marks = tuple(token_id for token_id in ids.values() if token_id is not None)
    # What comes before it is what M is about to say, in M's order: D may be unsure of the order,
    # but each of the words is right.
    separator = ids.get("separator")
    return Objective(config.loss, config.warm, spec, config.target.kind, marks, separator)


def _run_dir_problem(config: ExperimentConfig) -> str | None:
    problem = checkpoint_path_problem(config.run_dir)
    return problem and f"run_dir: {problem}"


def _embedded_model(config: ExperimentConfig, console: Console) -> str:
    """The folder of the embedded model; the first process trains it if it does not exist."""
    with first_before_others("embedded model"):
        return str(ensure_language_model(config, console))


def check_batches(config: ExperimentConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError if the mesh does not divide a batch size."""
    for name in ("dump.batch_size", "warm.batch_size", "joint.batch_size", "evaluate.batch_size"):
        check_batch(name, lookup(config, name), mesh)
    shared = config.joint.rows_per_document
    check_batch(
        "joint.batch_size / joint.rows_per_document", config.joint.batch_size // shared, mesh
    )


def check_context(config: ExperimentConfig, model: TransformerConfig, name: str) -> None:
    """Raises ConfigError if contexts are longer than the model supports."""
    if config.dump.seq_len > model.max_positions:
        raise ConfigError(
            f"dump.seq_len={config.dump.seq_len} is longer than the "
            f"{model.max_positions} positions that {name} supports"
        )


def open_caches(session: Session) -> tuple[RowSource, RowSource]:
    """The training and validation rows, checked against the model.

    Each process verifies some of the shards, and the first checks the positions.

    Raises:
      ValueError: a cache is missing, damaged, or of another model, layer or tokenizer.
    """
    if session.config.data.source == "stream":
        train, validation = open_stream(
            session.config, session.model, session.spec, session.mesh, session.console
        )
        _check_rows(session.config, train)
        session.console.line("stream", rows=len(train), validation_rows=len(validation))
        return train, validation
    train, validation = (open_cache_of(session, split) for split in SPLITS)
    _check_rows(session.config, train)
    return train, validation


def open_cache_of(session: Session, split: str) -> ActivationCache | LegacyCache:
    """The cache of a split, checked as :func:`open_caches` does."""
    folder = local_path(session.config.dump.cache_dir) / split
    cache = together(lambda: _open_split(session, folder))
    cache.check(
        model_id=session.model.model_id,
        weights_hash=session.model.weights_hash,
        tokenizer_hash=session.model.tokenizer.fingerprint,
        layer=session.config.model.layer,
        d_model=session.model.config.d_model,
        target=target_settings(session.config.target, session.config.lens),
    )
    return cache


def _open_split(session: Session, folder: Path) -> ActivationCache | LegacyCache:
    if not folder.exists():
        raise ConfigError(missing_cache(folder))
    share = (jax.process_index(), jax.process_count())
    return open_cache(folder, pad_id=session.model.tokenizer.pad_id, share=share)


def _check_rows(config: ExperimentConfig, cache: RowSource) -> None:
    """Raises ConfigError if a window that training reads is not inside its context."""
    problems = broadcast_from_first(lambda: list(_row_problems(config, cache)))
    if problems:
        raise ConfigError(problems)


def _row_problems(config: ExperimentConfig, cache: RowSource) -> Iterator[str]:
    windows = config.target.kind == "window"
    before, after = (config.warm.before, config.warm.after) if windows else (0, 0)
    after = max(after, config.loss.kl_horizon - 1, config.evaluate.kl_horizon - 1, 1)
    short = early = 0
    for rows in cache.places():
        short += int(np.sum(rows.positions_N + after >= rows.lengths_N))
        early += int(np.sum(rows.positions_N + 1 < before))
    if short:
        yield (
            f"dump.cache_dir: {short} rows have fewer than {after} tokens after their position, "
            "which warm.after, loss.kl_horizon and evaluate.kl_horizon read; lower these or dump "
            "again with a larger dump.after"
        )
    if early:
        yield (
            f"dump.cache_dir: {early} rows are before token warm.before={config.warm.before}; "
            "lower warm.before or dump again with a larger dump.min_position"
        )


def training_reference(cache: RowSource) -> ActivationStatistics:
    """Mean, scale and R of the training activations (of up to 16,384). Only the first process reads
    them from a cache; all of them capture those of a stream."""
    of_rows = lambda: activation_statistics(training_rows(cache, _REFERENCE_ROWS).activations_ND)
    if isinstance(cache, TokenStream):
        return of_rows()
    return ActivationStatistics.from_json(broadcast_from_first(lambda: of_rows().to_json()))


def training_range(
    cache: RowSource, norms: tuple[float, float] | None, vocab_size: int
) -> TrainingRange:
    """Positions and tokens of all training rows; only the first process reads a cache.

    The tokens of files of earlier systems are not recorded: that would read them completely.
    """

    def found() -> dict[str, Any]:
        positions = [places.positions_N for places in cache.places()]
        has_contexts = isinstance(cache, ActivationCache | TokenStream)
        tokens = tokens_seen(cache.contexts(), vocab_size) if has_contexts else None
        first, last = (int(end(map(end, positions))) for end in (min, max))
        return TrainingRange(first, last, norms, tokens).to_json()

    return TrainingRange.from_json(broadcast_from_first(found))


def training_rows(cache: RowSource, most: int) -> Rows:
    """The first rows, at most ``most``, with their activations."""
    count = min(len(cache), most)
    if isinstance(cache, TokenStream):
        return cache.captured(count)
    return cache.rows(np.arange(count))
