"""The tokenizer of a GGUF file as Hugging Face's files.

A GGUF file has the vocabulary, and names the rest: the kind (``gpt2``: byte-level BPE; ``llama``:
SentencePiece's BPE) and, for the first, how a text is cut into words before its merges.

Source: llama.cpp's ``src/llama-vocab.cpp``; the tokenizer.json of the models it names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from conlens_jax.models.from_gguf.header import GGUFFile

_PREFIX = "tokenizer.ggml."
_SPACE = "▁"
# Types of tokens.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Names that llama.cpp's converter gives to ids without a token.
_NO_TOKEN = re.compile(r"\[PAD\d+\]")

# Words: contractions, letters with one sign before them, digits, signs, line breaks, spaces.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_SIGNS}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cased(ending: str, digits: str) -> str:
    upper, lower = _CASED
    begin = r"[^\r\n\p{L}\p{N}]?"
    words = f"{begin}{upper}*{lower}+{ending}|{begin}{upper}+{lower}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _Words(NamedTuple):
    """How a byte-level tokenizer cuts a text.

    Attributes:
      pattern: of a word; empty: GPT-2's.
      before, after: further cuts.
      whole: a word that is in the vocabulary is one token, without merges.
      bos: whether a text begins with the bos token if the file does not say so.
      nfc: composed characters.
    """

    pattern: str = ""
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_GPT2_WORDS = _Words()
_DIGIT_WORDS = _Words(before=(pre_tokenizers.Digits(individual_digits=True),))
_THREE_DIGITS = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
_FALCON_WORDS = _Words(
    before=(pre_tokenizers.Punctuation("contiguous"),),
    after=(pre_tokenizers.Digits(individual_digits=False), _THREE_DIGITS),
)
_LLAMA3_WORDS = _Words(_LLAMA3, whole=True, bos=True)
_CL100K_WORDS, _QWEN2_WORDS = _Words(_LLAMA3), _Words(_QWEN2, nfc=True)
_O200K_WORDS = _Words(_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"))
_WORDS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "mpt", "jais"), _GPT2_WORDS),
    # GPT-NeoX's tokenizer.
    "olmo": _Words(nfc=True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "exaone"), _DIGIT_WORDS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3_WORDS),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _CL100K_WORDS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2_WORDS),
    "stablelm2": _Words(_QWEN2),
    "falcon": _FALCON_WORDS,
    "qwen35": _Words(_QWEN35, nfc=True),
    "tekken": _Words(_cased("", r"\p{N}"), whole=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "o200k"), _O200K_WORDS),
}


class _Vocabulary(NamedTuple):
    """The tokens of a file: ``tokens`` and ``kinds`` (their types) by id."""

    tokens: list[str]
    kinds: list[int]

    def ids(self) -> dict[str, int]:
        return {
            token: id
            for id, (token, kind) in enumerate(zip(*self, strict=True))
            if kind != _UNUSED or not _NO_TOKEN.fullmatch(token)
        }

    def of_kind(self, kind: int) -> Iterator[str]:
        return (token for token, own in zip(*self, strict=True) if own == kind)


def tokenizer_files(file: GGUFFile) -> dict[str, bytes]:
    """``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
      ValueError: another kind of tokenizer, or a vocabulary that does not fit.
    """
    read = lambda key, default=None: file.metadata.get(_PREFIX + key, default)
    kind = read("model")
    if kind not in _KINDS:
        raise ValueError(
            f"{file.path}: the tokenizer is of the kind {kind!r}; known are {', '.join(_KINDS)}"
        )
    tokens = read("tokens", [])
    rows = file.tensors["token_embd.weight"].shape[0]
    if not 0 < len(tokens) <= rows:
        raise ValueError(
            f"{file.path}: its vocabulary has {len(tokens):,} tokens and its embedding {rows:,} "
            "rows, so they do not belong together"
        )
    kinds = read("token_type") or [_NORMAL] * len(tokens)
    named = {
        f"{name}_token": read(f"{key}_token_id")
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    beyond = {name: id for name, id in named.items() if id is not None and id >= len(tokens)}
    if beyond or len(kinds) != len(tokens):
        problem = beyond or f"{len(kinds):,} types of tokens"
        raise ValueError(f"{file.path}: {problem} do not fit a vocabulary of {len(tokens):,}")
    try:
        backend, adds_bos = _KINDS[kind](file, _Vocabulary(tokens, kinds))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"{file.path}: its tokenizer cannot be used: {error}") from error
    special = {name: tokens[id] for name, id in named.items() if id is not None}
    adds_bos = read("add_bos_token", adds_bos)
    if adds_bos and (bos := special.get("bos_token")):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, named["bos_token"])],
        )
    return {
        "tokenizer.json": backend.to_str().encode("utf-8"),
        "tokenizer_config.json": _settings(file, special).encode("utf-8"),
    }


def _settings(file: GGUFFile, special: dict[str, str]) -> str:
    settings: dict[str, Any] = {
        # A more specific class would rebuild the tokenizer from parts.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if template := file.metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _byte_level(file: GGUFFile, found: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    name = file.metadata.get(_PREFIX + "pre", "default")
    if name not in _WORDS:
        raise ValueError(f"its words are cut as {name!r} does; known are {', '.join(_WORDS)}")
    words, merges = _WORDS[name], file.metadata.get(_PREFIX + "merges")
    if not merges:
        raise ValueError("there are no merges")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = tokenizers.Tokenizer(models.BPE(found.ids(), pairs, ignore_merges=words.whole))
    if words.nfc:
        backend.normalizer = normalizers.NFC()
    split = [pre_tokenizers.Split(Regex(words.pattern), "isolated")] if words.pattern else []
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words.pattern)
    steps = [*words.before, *split, level, *words.after]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, found)
    return backend, words.bos


def _sentencepiece(file: GGUFFile, found: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    is_gemma = file.architecture.startswith("gemma")
    # Runs of spaces, which the converter writes as spaces.
    written = [
        token.replace(" ", _SPACE) if token and not token.strip(" ") else token
        for token in found.tokens
    ]
    found = found._replace(tokens=written)
    scores = file.metadata.get(_PREFIX + "scores")
    if is_gemma or not scores:  # Gemma's scores are not in the order of its merges
        scores = [-id for id in range(len(written))]
    unknown = file.metadata.get(_PREFIX + "unknown_token_id")
    model = models.BPE(
        found.ids(),
        _merges(found, scores),
        unk_token=None if unknown is None else written[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    prepends = file.metadata.get(_PREFIX + "add_space_prefix", not is_gemma)
    spaces = [normalizers.Prepend(_SPACE)] if prepends else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prepends else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_tokens(backend, found)
    return backend, True


def _merges(found: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece's merges: any two tokens that make a token, those of the best token first."""
    ids, ranked = found.ids(), []
    for id, (token, kind) in enumerate(zip(*found, strict=True)):
        if kind in (_NORMAL, _USER_DEFINED):
            for at in range(1, len(token)):
                left, right = ids.get(token[:at]), ids.get(token[at:])
                if left is not None and right is not None:
                    ranked.append((-scores[id], id, left, right))
    ranked.sort()
    return [(found.tokens[left], found.tokens[right]) for _, _, left, right in ranked]


def _add_tokens(backend: tokenizers.Tokenizer, found: _Vocabulary) -> None:
    """Tokens that a text contains as they are written, without words and merges."""
    add = lambda token, special: AddedToken(token, normalized=False, special=special)
    backend.add_special_tokens([add(token, True) for token in found.of_kind(_CONTROL)])
    spaces = lambda token: not token.strip(_SPACE)
    own = [token for token in found.of_kind(_USER_DEFINED) if not spaces(token)]
    backend.add_tokens([add(token, False) for token in own])


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
