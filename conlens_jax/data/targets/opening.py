"""The targets of a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.sharding import Mesh

from conlens_jax.config import ConfigError, ExperimentConfig, LensConfig, TargetConfig
from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.data.targets.facts import FactTargets
from conlens_jax.data.targets.file import FileTargets
from conlens_jax.data.targets.model import ModelTargets
from conlens_jax.data.targets.protocol import Targets
from conlens_jax.data.targets.words import WordTargets
from conlens_jax.lens.spec import LensSpec, token_of_field
from conlens_jax.models.from_gguf.source import gguf_source
from conlens_jax.models.hub import resolve_folder
from conlens_jax.models.model import LanguageModel, load_model
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.parallel.processes import first_before_others

_FIELDS = {
    "window": (),
    "words": (
        *("next_words", "next_probability", "context_words", "nearness"),
        "most_common",
        *("comma", "separator"),
    ),
    "facts": ("comma",),
    "file": ("path",),
    "model": ("prompt", "model_path", "temperature", "seed"),
}
_MARKS = {"words": ("comma", "separator"), "facts": ("comma",)}


def target_settings(target: TargetConfig, lens: LensConfig) -> dict[str, Any]:
    """The settings that determine the targets, for a cache's metadata; empty for windows, which are
    not in the cache."""
    if target.kind == "window":
        return {}
    fields = {name: getattr(target, name) for name in _FIELDS[target.kind]}
    if target.kind == "words" and target.recent_tokens:  # caches of earlier versions have none
        fields["recent_tokens"] = target.recent_tokens
    ends = {"text_len": lens.text_len, "end_token": lens.end_token}
    return {"kind": target.kind, **ends, **fields}


def mark_ids(target: TargetConfig, tokenizer: Tokenizer) -> dict[str, int | None]:
    """The tokens between the words of a target, by field; None for one that is left out.

    Raises:
      ValueError: one is not a single token.
    """
    return {
        name: token_of_field(f"target.{name}", getattr(target, name), tokenizer)
        for name in _MARKS.get(target.kind, ())
    }


def open_targets(
    config: ExperimentConfig,
    model: LanguageModel,
    spec: LensSpec,
    mesh: Mesh,
    contexts: Callable[[], Iterable[Sequence[int]]],
) -> Targets | None:
    """Makes the targets of ``target.kind``; None for windows.

    Args:
      model: M.
      contexts: the tokens of the training documents' contexts, from the first one.

    Raises:
      ValueError: a mark is not a single token, ``target.path`` or ``target.model_path`` cannot be
        read, or ``target.prompt`` does not fit the model that writes.
    """
    target, tokenizer = config.target, model.tokenizer
    if target.kind == "window":
        return None
    if target.kind == "file":
        return FileTargets(target.path, tokenizer)
    if target.kind == "model":
        return _model_targets(config, model, spec, mesh)
    marks, text_len = mark_ids(target, tokenizer), spec.text_len
    if target.kind == "facts":
        variables = GENERATORS[config.corpus.kind].variables
        return FactTargets(variables, tokenizer, **marks, text_len=text_len)
    assert spec.end is not None
    return WordTargets(
        target, tokenizer, **marks, end=spec.end, text_len=text_len, contexts=contexts
    )


def _model_targets(
    config: ExperimentConfig, model: LanguageModel, spec: LensSpec, mesh: Mesh
) -> ModelTargets:
    dump, last = config.dump, config.dump.seq_len - 1 - config.dump.after
    assert spec.end is not None
    return ModelTargets(
        config.target,
        _load_writer(config, mesh) if config.target.model_path else model,
        model.tokenizer,
        mesh,
        longest=1 + min(last, dump.max_position or last),
        batch_size=dump.batch_size,
        end=spec.end,
        text_len=spec.text_len,
    )


def _load_writer(config: ExperimentConfig, mesh: Mesh) -> LanguageModel:
    path, how = config.target.model_path, config.model
    try:
        with first_before_others("model that writes targets"):
            if gguf_source(path):
                resolve_folder(path)  # converted by one process
        return load_model(
            path,
            dtype=how.dtype,
            mesh=mesh,
            unroll=how.unroll,
            attention=how.attention,
            quantise=how.quantise,
        )
    except ValueError as error:
        raise ConfigError(str(error).replace("model.path", "target.model_path")) from error
