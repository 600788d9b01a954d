"""``tokenizer.json``: reading it, the prefix of its template, and clean-up after decoding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import models

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")  # of a Sequence
_TRIVIAL = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


def read_tokenizer(content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a ``tokenizer.json``.

    Raises:
      ValueError: not JSON, not a tokenizer, or a kind that the installed ``tokenizers`` does not
        know; the message names it.
    """
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(values, dict) or "model" not in values:
        raise ValueError('it has no "model"; save it with save_pretrained')
    try:
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        unknown = ", ".join(_unknown_kinds(values))
        installed = f"the installed tokenizers {tokenizers.__version__}"
        if not unknown:
            raise ValueError(f"{installed} cannot read it: {error}") from error
        raise ValueError(
            f"{installed} cannot read {unknown} in it; where a newer version wrote it, "
            "pip install -U tokenizers"
        ) from error


def _unknown_kinds(values: Mapping[str, Any]) -> Iterator[str]:
    """The parts of a ``tokenizer.json`` that cannot be read on their own, with their kinds."""
    empty = {"added_tokens": [], "truncation": None, "padding": None}
    empty |= {"version": "1.0", "model": _TRIVIAL, **dict.fromkeys(_PARTS)}

    def reads(**part: Any) -> bool:
        try:
            tokenizers.Tokenizer.from_str(json.dumps({**empty, **part}))
        except Exception:  # as above
            return False
        return True

    def named(part: str, value: Any) -> Iterator[str]:
        if value is None or reads(**{part: value}):
            return
        inner = next((value[name] for name in _LISTS if name in value), ()) if value else ()
        inside = [name for entry in inner for name in named(part, entry)]
        kind = value.get("type") if isinstance(value, Mapping) else value
        yield from inside or [f"the {part} of type {kind!r}"]

    if values.get("version", "1.0") != "1.0" and not reads(version=values["version"]):
        yield f"the version {values['version']!r} of the file"
    yield from named("model", values["model"])
    for part in _PARTS:
        yield from named(part, values.get(part))


def template_prefix(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that the post-processor adds before a text."""
    for text in ("a", "0", "the", "."):
        bare = tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.encode(text, add_special_tokens=True).ids
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return tuple(whole[:start])
    return ()


def clean_up(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> Callable[[str], str]:
    """The clean-up after decoding that ``clean_up_tokenization_spaces`` configures; as in
    transformers, never with byte-pair encoding, whose spaces are part of the text."""
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    is_bpe = isinstance(tokenizer.model, models.BPE)
    if not config.get("clean_up_tokenization_spaces") or (is_bpe and not forced):
        return lambda text: text
    return _without_spaces


def _without_spaces(text: str) -> str:
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text
