"""Checks before a model is loaded or trained: files, folders, packages, runs.

Entry points call :func:`check_files` first, so that a typing error costs a second, and all problems
are in one message. The checks leave no files behind and do not access the hub.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from conlens_jax.config import (
    EMBEDDED_MODEL,
    ConfigError,
    CorpusConfig,
    ExperimentConfig,
    TargetConfig,
)
from conlens_jax.corpora.corpus import SPLITS
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.data.extract import TEST
from conlens_jax.data.targets.file import find_explanations
from conlens_jax.files.paths import cache_folder, local_path, write_problems
from conlens_jax.models.from_gguf.source import gguf_source
from conlens_jax.models.hf_io import read_config_file
from conlens_jax.models.other_formats import check_folder
from conlens_jax.models.weight_files import weight_files
from conlens_jax.parallel.processes import broadcast_from_first
from conlens_jax.tracking.console import Console
from conlens_jax.training.checkpoint import all_steps
from conlens_jax.training.places import metadata_of_run, recorded_model, with_cache_found
from conlens_jax.training.run_folder import checkpoint_of, claim_folder
from conlens_jax.training.starting_lens import starting_lens_problem

_PACKAGES = {"parquet": "pyarrow", "huggingface": "datasets"}


def check_files(
    configs: ExperimentConfig | Sequence[ExperimentConfig],
    *,
    dumps: bool = False,
    trains: bool = False,
    evaluates: str | Path | None = None,
) -> None:
    """Checks the inputs and outputs of one config, or of those of several runs.

    Only the first process checks; all raise what it finds.

    Args:
      dumps: activations will be dumped.
      trains: a lens will be trained.
      evaluates: the run folder or checkpoint that will be measured.

    Raises:
      ConfigError: every problem, each with its field and the fix.
    """
    several = [configs] if isinstance(configs, ExperimentConfig) else list(configs)

    def find() -> list[str]:
        found = [p for config in several for p in _problems(config, dumps, trains, evaluates)]
        return list(dict.fromkeys(found))

    problems = broadcast_from_first(find)
    if problems:
        raise ConfigError(problems)


def _problems(
    config: ExperimentConfig, dumps: bool, trains: bool, evaluates: str | Path | None
) -> Iterator[str]:
    reads_rows = trains or evaluates is not None
    streams = config.data.source == "stream"
    run = local_path(config.run_dir) if trains else None
    if evaluates is not None:
        run = checkpoint_of(evaluates)[0].parent
    metadata = metadata_of_run(run)
    if metadata:
        config = with_cache_found(config, metadata, run, Console(enabled=False))
    if not metadata or recorded_model(config, metadata, run) is None:
        yield from _model_problems("model.path", config.model.path)
    if dumps or (reads_rows and streams):
        yield from corpus_problems(config.corpus)
        yield from _target_problems(config.target)
    cache = local_path(config.dump.cache_dir)
    wanted = list(SPLITS)
    if (dumps and config.dump.n_test_samples) or (
        evaluates is not None and config.evaluate.split == TEST
    ):
        wanted.append(TEST)
    missing = [split for split in wanted if not (cache / split).is_dir()]
    if dumps and missing:
        yield from write_problems("dump.cache_dir", cache)
    if reads_rows and not dumps and not streams:
        yield from (missing_cache(cache / split) for split in missing)
    if trains:
        yield from _run_problems(config)
    if evaluates is not None:
        folder, _ = checkpoint_of(evaluates)
        if not all_steps(folder):
            yield f"--checkpoint={str(evaluates)!r}: there is no checkpoint in {folder}"
        else:
            yield from write_problems("run_dir", folder.parent)
    if config.train.compile_cache:
        yield from write_problems("train.compile_cache", config.train.compile_cache)


def missing_cache(folder: Path) -> str:
    """The message for a missing cache of a split, ``folder``."""
    return (
        f"dump.cache_dir={str(folder.parent)!r}: there is no {folder.name} cache; make it "
        "with python -m conlens_jax.dump and the same config"
        + (" with dump.n_test_samples" if folder.name == TEST else "")
    )


def corpus_problems(config: CorpusConfig) -> Iterator[str]:
    """Missing files, columns and packages of a corpus; datasets on the hub are not checked."""
    if config.kind == "model":
        yield from write_problems("corpus.path", config.path or cache_folder())
    package = _PACKAGES.get(config.kind)
    if package and importlib.util.find_spec(package) is None:
        yield f"corpus.kind={config.kind!r} needs the package {package}: pip install {package}"
    elif config.kind == "huggingface":
        if _is_local(config.path) and not local_path(config.path).exists():
            yield f"corpus.path={config.path!r} does not exist"
    else:
        try:
            open_corpus(config)
        except (ValueError, OSError) as error:
            yield str(error)


def _target_problems(target: TargetConfig) -> Iterator[str]:
    if target.kind == "model" and target.model_path:
        yield from _model_problems("target.model_path", target.model_path)
    if target.kind == "file":
        try:
            find_explanations(target.path)
        except ValueError as error:
            yield str(error)


def _model_problems(field: str, path: str) -> Iterator[str]:
    if path == EMBEDDED_MODEL and field == "model.path":
        return
    try:
        if gguf_source(path):
            return
    except ValueError as error:
        yield str(error).replace("model.path", field)
        return
    folder = local_path(path)
    if folder.is_dir():
        try:
            check_folder(folder)
            read_config_file(folder / "config.json")
            weight_files(folder)
        except ValueError as error:
            yield str(error).replace("model.path", field)
    elif folder.exists():
        yield f"{field}={path!r} is a file; give the folder of the model"
    elif _is_local(path):
        yield f"{field}={path!r}: there is no such folder"


def _run_problems(config: ExperimentConfig) -> Iterator[str]:
    folder = local_path(config.run_dir)
    unwritable = list(write_problems("run_dir", folder))
    yield from unwritable
    if not unwritable:
        try:
            claim_folder(folder, config, write=False)
        except ConfigError as error:
            yield from error.problems
    start = config.train.init_from
    if start and (problem := starting_lens_problem(start)):
        yield problem


def _is_local(path: str) -> bool:
    """Whether it can only be a path on this machine, not a hub id."""
    return path.count("/") > 1 or path.startswith((".", "/", "~"))
