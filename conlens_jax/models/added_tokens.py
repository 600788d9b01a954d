"""Tokens named by the files next to ``tokenizer.json``, added as transformers adds them.

``transformers`` 5 reads ``tokenizer_config.json``. Where that has an ``added_tokens_decoder`` it
reads nothing else; an older folder's ``special_tokens_map.json`` (whose names win) and
``added_tokens.json`` count where it has none. What ``tokenizer.json`` does not contain is
added after its vocabulary: the listed tokens in the order of their ids, then the named special
tokens, then the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"

_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_OTHERS = ("extra_special_tokens", "additional_special_tokens")

Files = Mapping[str, Mapping[str, Any]]
"""The JSON objects in the files next to ``tokenizer.json``, by file name."""


def named_tokens(files: Files) -> dict[str, str]:
    """The special tokens by name (``"bos_token"``, ``"image_token"``...), as a chat template gets
    them. Names without a token (null) are left out."""
    return {name: _content(token) for name, token in _named(_settings(files)).items()}


def add_tokens(tokenizer: tokenizers.Tokenizer, files: Files) -> list[list[Any]]:
    """Adds to ``tokenizer`` what the files name and it does not have.

    Returns:
      ``[id, content, flags]`` of each token that is new or now matches differently in a text.

    Raises:
      ValueError: a file with other content than its name promises.
    """
    settings, before = _settings(files), tokenizer.get_added_tokens_decoder()
    named = _named(settings)
    listed = _listed(settings, files, before)
    known = {repr(token) for token in before.values()}
    adding = [token for _, token in sorted(listed.items()) if repr(token) not in known]
    contents = {token.content for token in (*before.values(), *adding)}
    for token in (*named.values(), *_others(settings)):
        content = _content(token)
        if content not in contents:
            contents.add(content)
            adding.append(_added(token, special=True))
    for token in adding:
        if not token.special and token.content in map(_content, named.values()):
            token.special = True
    if adding:
        tokenizer.add_tokens(adding)
    after = tokenizer.get_added_tokens_decoder()
    return [
        [token_id, token.content, [getattr(token, flag) for flag in _FLAGS]]
        for token_id, token in sorted(after.items())
        if token_id not in before or _how_found(before[token_id]) != _how_found(token)
    ]


def _how_found(token: AddedToken) -> tuple[bool, ...]:
    return tuple(getattr(token, flag) for flag in _FLAGS[:-1])


def _settings(files: Files) -> dict[str, Any]:
    """``tokenizer_config.json``, with an older folder's ``special_tokens_map.json`` over it."""
    settings = dict(files.get(CONFIG_FILE, {}))
    if "added_tokens_decoder" not in settings:
        settings |= files.get(SPECIAL_FILE, {})
    return settings


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Name to token; the standard names first, then the model's own (``image_token``...)."""
    own = [name for name in settings if name.endswith("_token") and name[:-6] not in _NAMES]
    named = {name: settings.get(name) for name in (*(f"{n}_token" for n in _NAMES), *own)}
    extra = settings.get(_OTHERS[0])
    if isinstance(extra, Mapping):  # named ones too
        named |= extra
    return {name: token for name, token in named.items() if _is_token(token)}


def _others(settings: Mapping[str, Any]) -> list[Any]:
    """Special tokens without a name."""
    found = settings.get(_OTHERS[0])
    if not found or isinstance(found, Mapping):
        found = settings.get(_OTHERS[1]) if not found else []
    return [token for token in found or [] if _is_token(token)]


def _listed(
    settings: Mapping[str, Any], files: Files, before: Mapping[int, AddedToken]
) -> dict[int, AddedToken]:
    """Added tokens by id. An older folder's ids count where ``tokenizer.json`` has none there."""
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"] or {}
        try:
            return {int(token_id): _added(token) for token_id, token in listed.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{CONFIG_FILE}: added_tokens_decoder must map ids to tokens ({error!r})"
            ) from error
    tokens = [*_named(settings).values(), *_others(settings)]
    special = set(map(_content, tokens))
    try:
        return {
            int(token_id): AddedToken(
                content, normalized=content not in special, special=content in special
            )
            for content, token_id in files.get(ADDED_FILE, {}).items()
            if int(token_id) not in before
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"{ADDED_FILE} must map tokens to ids ({error!r})") from error


def _is_token(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = value.get("content")
    return isinstance(value, str) and bool(value)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _added(token: str | Mapping[str, Any], special: bool | None = None) -> AddedToken:
    """A token as the ``tokenizers`` library takes it; ``special`` overrides its own flag."""
    if isinstance(token, str):
        return AddedToken(token, special=bool(special))
    flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
    if special is not None:
        flags["special"] = special
    return AddedToken(token["content"], **flags)
