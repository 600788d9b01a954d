"""The tokens of GGUF files: those of transformers, on awkward texts."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from awkward_strings import awkward_texts
from test_same_tokens import LLAMA3, SPECIAL, byte_level, with_byte_fallback

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from gguf_writing import write_gguf  # noqa: E402

from conlens_jax.models.from_gguf.header import read_gguf  # noqa: E402
from conlens_jax.models.from_gguf.tokenizer import tokenizer_files  # noqa: E402
from conlens_jax.models.tokenizer import Tokenizer  # noqa: E402

CONTROL, USER_DEFINED, BYTE, NORMAL = 3, 4, 6, 1
IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


def vocabulary(backend) -> tuple[list[str], list[int], list[list[str]]]:
    """Tokens and their types by id, and the merges."""
    values = json.loads(backend.to_str())
    ids = values["model"]["vocab"] | {
        token["content"]: token["id"] for token in values["added_tokens"]
    }
    tokens = sorted(ids, key=ids.get)
    assert sorted(ids.values()) == list(range(len(ids)))
    kinds = {"<tool>": USER_DEFINED, **dict.fromkeys(SPECIAL, CONTROL)}
    kinds |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    return tokens, [kinds.get(token, NORMAL) for token in tokens], values["model"]["merges"]


def both(folder: Path, architecture: str, tokenizer: dict) -> tuple[Tokenizer, object]:
    embedding = {"token_embd.weight": np.zeros((len(tokenizer["tokens"]), 32))}
    path = folder / "tokens.gguf"
    write_gguf(path, architecture, {}, embedding, tokenizer=IDS | tokenizer)
    files = tokenizer_files(read_gguf(path))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    # Reading what was written, as from any folder.
    ours = Tokenizer.from_folder(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    return ours, theirs


@pytest.fixture(scope="module")
def byte_tokens():
    """Of a byte-level tokenizer, whose words are Llama 3's."""
    tokens, kinds, merges = vocabulary(byte_level(False, LLAMA3))
    merges = [" ".join(merge) for merge in merges]
    return {"model": "gpt2", "tokens": tokens, "token_type": kinds, "merges": merges}


def one_by_one(text: str) -> Iterator[str]:
    """The text, cut before and after each numeral."""
    start = 0
    for at, letter in enumerate(text):
        if unicodedata.category(letter).startswith("N"):
            yield from (text[start:at], letter)
            start = at + 1
    yield text[start:]


def composed(text: str) -> Iterator[str]:
    yield unicodedata.normalize("NFC", text)


def whole(text: str) -> Iterator[str]:
    yield text


# What transformers leaves out of its reading is done to the text before.
BEFORE = {
    **dict.fromkeys(("gpt-2", "llama-bpe", "dbrx", "tekken", "gpt-4o"), whole),
    **dict.fromkeys(("qwen2", "qwen35", "olmo"), composed),
    **dict.fromkeys(("smollm", "starcoder"), one_by_one),
}


@pytest.mark.parametrize("pre", BEFORE)
def test_byte_level(pre, byte_tokens, tmp_path):
    ours, theirs = both(tmp_path, "llama", byte_tokens | {"pre": pre})
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (1, 2, 0)
    assert ours.vocab_size == len(byte_tokens["tokens"])
    for text in awkward_texts():
        parts = [part for part in BEFORE[pre](text) if part]
        expected = [id for part in parts for id in theirs(part, add_special_tokens=False).input_ids]
        assert (ids := ours.encode(text)) == expected, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_words_that_need_no_merges(byte_tokens, tmp_path):
    """Llama 3's tokenizer takes a word of the vocabulary as it is."""
    more = {"tokens": [*byte_tokens["tokens"], "zqx"]}
    more["token_type"] = [*byte_tokens["token_type"], NORMAL]
    for pre, n_tokens in (("llama-bpe", 1), ("gpt-2", 3)):
        ours, _ = both(tmp_path, "llama", byte_tokens | more | {"pre": pre})
        assert len(ours.encode("zqx")) == n_tokens


def test_falcons_words(byte_tokens, tmp_path):
    """Digits by three, runs of signs: transformers' reading has neither."""
    ours, _ = both(tmp_path, "falcon", byte_tokens | {"pre": "falcon"})
    pieces = ["the", " fox", "!?", " ", "123", "456", "7", "..."]
    assert ours.encode("".join(pieces)) == [id for piece in pieces for id in ours.encode(piece)]


@pytest.mark.parametrize(("architecture", "prefix"), [("phi3", True), ("gemma2", False)])
def test_sentencepiece(architecture, prefix, tmp_path):
    """Phi-3's are Llama 2's; Gemma's have runs of spaces, written as spaces."""
    tokens, kinds, _ = vocabulary(with_byte_fallback(prefix))
    tokens += ["  ", "   "]
    kinds += [USER_DEFINED] * 2
    scores = [-float(id) for id in range(len(tokens))]
    tokenizer = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores}
    tokenizer["add_space_prefix"] = prefix
    ours, theirs = both(tmp_path, architecture, tokenizer)
    for text in awkward_texts():
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert ours.encode("a  b") != ours.encode("a b")


def test_scores_order_the_merges(tmp_path):
    """ab + c or a + bc: the better token is made first."""
    tokens = [*SPECIAL, "a", "b", "c", "ab", "bc", "abc"]
    kinds = [CONTROL] * 3 + [NORMAL] * 6
    for better, expected in ((6, [6, 5]), (7, [3, 7])):
        scores = [0.0] * 6 + [-5.0, -5.0, -9.0]
        scores[better] = -1.0
        tokenizer = {"model": "llama", "tokens": tokens[:8] + ["zz"], "token_type": kinds}
        ours, _ = both(tmp_path, "llama", tokenizer | {"scores": scores, "add_space_prefix": False})
        assert ours.encode("abc") == expected


@pytest.mark.parametrize(
    ("tokenizer", "begins"),
    [
        ({"pre": "gpt-2"}, False),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "qwen2", "add_bos_token": True}, True),
    ],
)
def test_who_begins_with_bos(tokenizer, begins, byte_tokens, tmp_path):
    ours, _ = both(tmp_path, "llama", byte_tokens | tokenizer)
    assert ours.bos_prefix == ((1,) if begins else ())
    assert ours.encode("<s>the", "auto") == ours.encode("the", True)


def test_ids_without_a_token(byte_tokens, tmp_path):
    """The converter fills the vocabulary up to the embedding; such a name is ordinary text."""
    n = len(byte_tokens["tokens"])
    filled = byte_tokens | {
        "pre": "gpt-2",
        "tokens": [*byte_tokens["tokens"], f"[PAD{n}]", f"[PAD{n + 1}]"],
        "token_type": [*byte_tokens["token_type"], 5, 5],
    }
    ours, _ = both(tmp_path, "llama", filled)
    assert ours.vocab_size == n
    assert ours.decode(ours.encode(f"[PAD{n}]")) == f"[PAD{n}]"
