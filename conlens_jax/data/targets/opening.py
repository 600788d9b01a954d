"""The targets of a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from conlens_jax.config import ExperimentConfig, LensConfig, TargetConfig
from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.data.targets.facts import FactTargets
from conlens_jax.data.targets.file import FileTargets
from conlens_jax.data.targets.protocol import Targets
from conlens_jax.data.targets.words import WordTargets
from conlens_jax.lens.spec import LensSpec, token_of_field
from conlens_jax.models.tokenizer import Tokenizer

_FIELDS = {
    "window": (),
    "words": (
        *("next_words", "next_probability", "context_words", "nearness"),
        "most_common",
        *("comma", "separator"),
    ),
    "facts": ("comma",),
    "file": ("path",),
}
_MARKS = {"words": ("comma", "separator"), "facts": ("comma",)}


def target_settings(target: TargetConfig, lens: LensConfig) -> dict[str, Any]:
    """The settings that determine the targets, for a cache's metadata; empty for windows, which are
    not in the cache."""
    if target.kind == "window":
        return {}
    fields = {name: getattr(target, name) for name in _FIELDS[target.kind]}
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
    tokenizer: Tokenizer,
    spec: LensSpec,
    contexts: Callable[[], Iterable[Sequence[int]]],
) -> Targets | None:
    """Makes the targets of ``target.kind``; None for windows.

    Args:
      contexts: the tokens of the training documents' contexts, from the first one.

    Raises:
      ValueError: a mark is not a single token, or ``target.path`` cannot be read.
    """
    target = config.target
    if target.kind == "window":
        return None
    if target.kind == "file":
        return FileTargets(target.path, tokenizer)
    marks, text_len = mark_ids(target, tokenizer), spec.text_len
    if target.kind == "facts":
        variables = GENERATORS[config.corpus.kind].variables
        return FactTargets(variables, tokenizer, **marks, text_len=text_len)
    assert spec.end is not None
    return WordTargets(
        target, tokenizer, **marks, end=spec.end, text_len=text_len, contexts=contexts
    )
