"""The same tokens as transformers: tokenizers of every kind, added tokens, who begins with bos."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from awkward_strings import awkward_texts
from tiny_models import write_tiny_folder
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from conlens_jax.corpora.stories import story
from conlens_jax.models.model import load_model
from conlens_jax.models.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

SPECIAL = ["<unk>", "<s>", "</s>"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    return [*(story(0, index).text for index in range(60)), *awkward_texts()]


def trained(backend: Backend, trainer: trainers.Trainer) -> Backend:
    backend.train_from_iterator(corpus(), trainer)
    backend.add_special_tokens([AddedToken("<tool>", lstrip=True, rstrip=True, special=False)])
    return backend


def with_template(backend: Backend) -> Backend:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def byte_level(prefix_space: bool, pattern: str = "") -> Backend:
    """As GPT-2's, or with the words of Llama 3."""
    backend = Backend(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not pattern)
    split = pre_tokenizers.Split(Regex(pattern), "isolated") if pattern else None
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split else level
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return trained(
        backend,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )


def with_byte_fallback(prefix_space: bool) -> Backend:
    """As Llama 2's (with a space in front) or Gemma's."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Prepend("▁")] if prefix_space else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    if not prefix_space:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIAL, *bytes_],
        limit_alphabet=60,
        show_progress=False,
        max_token_length=12,
    )
    backend.train_from_iterator(corpus()[:60], trainer)
    # Bytes are ordinary tokens there, not special ones.
    values = json.loads(backend.to_str())
    values["added_tokens"] = values["added_tokens"][: len(SPECIAL)]
    backend = Backend.from_str(json.dumps(values))
    backend.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    return with_template(backend)


def unigram(prefix_space: bool) -> Backend:
    """As T5's or ALBERT's."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    scheme = "always" if prefix_space else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.train_from_iterator(
        corpus()[:80],
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return backend


KINDS = {
    "byte-level": functools.partial(byte_level, False),
    "byte-level, prefix space": functools.partial(byte_level, True),
    "byte-level, Llama 3": lambda: with_template(byte_level(False, LLAMA3)),
    "byte fallback": functools.partial(with_byte_fallback, False),
    "byte fallback, prefix space": functools.partial(with_byte_fallback, True),
    "Unigram": functools.partial(unigram, False),
    "Unigram, prefix space": functools.partial(unigram, True),
}


def written(folder: Path, backend: Backend, **files) -> Path:
    """A folder with the tokenizer and JSON files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    files = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}} | files
    for name, values in files.items():
        if values is not None:
            (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def both(folder: Path) -> tuple[Tokenizer, transformers.PreTrainedTokenizerFast]:
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


def ids_of(theirs, text: str, special: bool = False) -> list[int]:
    return theirs(text, add_special_tokens=special)["input_ids"]


@pytest.mark.parametrize("cleans_up", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_texts(kind, cleans_up, tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
    config["clean_up_tokenization_spaces"] = cleans_up
    ours, theirs = both(written(tmp_path, KINDS[kind](), tokenizer_config=config))
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (1, 2, 0)
    assert ours.vocab_size == len(theirs)
    texts, template = awkward_texts(), len(ours.bos_prefix)
    assert len(texts) == len(set(texts)) == 200
    for text, batched in zip(texts, ours.encode_batch(texts), strict=True):
        ids = ours.encode(text)
        assert ids == batched == ids_of(theirs, text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        # With the template's beginning, unless the text brings its own.
        with_bos = ours.encode(text, "auto")
        whole = ids_of(theirs, text, special=True)
        begins = template and ids[:1] == [1]
        assert with_bos == (ids if begins else whole[: len(ids) + template])
        assert with_bos[:2] != [1, 1] or text.startswith("<s><s>")


# --- tokens from the files beside tokenizer.json ------------------------------------------------

FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
START = {"content": "<|im_start|>", **FLAGS, "special": True}
PLAIN = {"content": "  ", **FLAGS, "normalized": True, "special": False}
BASE = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
BESIDE = {
    "nothing": {"tokenizer_config": None},
    "decoder": {"tokenizer_config": {**BASE, "added_tokens_decoder": {"17": START, "9": PLAIN}}},
    "decoder, with the old ids": {
        "tokenizer_config": {
            **BASE,
            "added_tokens_decoder": {
                "1": {"content": "<s>", **FLAGS, "lstrip": True, "special": True},
                "7": {"content": "word", **FLAGS, "special": False},
                "40": START,
            },
        }
    },
    "decoder, and a map that is not read": {
        "tokenizer_config": {**BASE, "added_tokens_decoder": {"8": START}},
        "special_tokens_map": {"pad_token": "<|map|>", "additional_special_tokens": ["<|old|>"]},
        "added_tokens": {"<|legacy|>": 11},
    },
    "additional": {"tokenizer_config": {**BASE, "additional_special_tokens": ["<|a|>", "<|b|>"]}},
    "extra": {"tokenizer_config": {**BASE, "extra_special_tokens": ["<|b|>", "<|a|>"]}},
    "extra, by name": {
        "tokenizer_config": {**BASE, "extra_special_tokens": {"image_token": "<|image|>"}}
    },
    "names of its own": {"tokenizer_config": {**BASE, "image_token": "<|image|>"}},
    "pad that is new": {"tokenizer_config": {**BASE, "pad_token": "<|pad|>"}},
    "special, but a word": {"tokenizer_config": {**BASE, "pad_token": "word"}},
    "typed token": {
        "tokenizer_config": {**BASE, "pad_token": {"__type": "AddedToken", **START}},
    },
    "map": {
        "tokenizer_config": {**BASE, "pad_token": "<|pad|>"},
        "special_tokens_map": {
            "eos_token": {"content": "<|map|>", **FLAGS},
            "pad_token": "</s>",
            "additional_special_tokens": ["<|a|>"],
        },
    },
    "map alone": {"tokenizer_config": None, "special_tokens_map": {**NAMES, "pad_token": "word"}},
    "added": {"added_tokens": {"<|legacy|>": 11, "<|second|>": 10, "<s>": 1}},
    "added, special": {
        "tokenizer_config": {**BASE, "additional_special_tokens": ["<|legacy|>"]},
        "added_tokens": {"<|legacy|>": 10, "<|second|>": 11},
    },
    "not split": {"tokenizer_config": {**BASE, "split_special_tokens": True}},
}
TEXTS = (
    "word",
    "a <|im_start|> b  c",
    "<|im_start|>word<|a|><|b|>",
    " <s> a</s>word",
    "<|image|><|pad|> <|map|>",
    "<|legacy|>a<|second|> <|old|>",
)


@pytest.mark.parametrize("beside", BESIDE)
def test_added_and_special_tokens(beside, tmp_path):
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "a", "b", "c", "word"])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    ours, theirs = both(written(tmp_path, backend, **BESIDE[beside]))
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == ids_of(theirs, text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    for name, token_id in (("bos", ours.bos_id), ("eos", ours.eos_id), ("pad", ours.pad_id)):
        wanted = getattr(theirs, f"{name}_token_id")
        if wanted is not None:
            assert token_id == wanted, name


def test_the_fingerprint_is_of_all_tokens(tmp_path):
    backend = Backend(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    seen = set()
    for number, beside in enumerate(("nothing", "decoder", "additional")):
        ours = Tokenizer.from_folder(written(tmp_path / str(number), backend, **BESIDE[beside]))
        seen.add(ours.fingerprint)
        ours.save(tmp_path / "copy")
        assert Tokenizer.from_folder(tmp_path / "copy").fingerprint == ours.fingerprint
    assert len(seen) == 3
    content = (tmp_path / "0" / "tokenizer.json").read_bytes()
    # As it always was where the other files add nothing.
    assert hashlib.sha256(content).hexdigest() in seen


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("tokenizer_config", {"added_tokens_decoder": {"x": START}}, "added_tokens_decoder must"),
        ("tokenizer_config", {"added_tokens_decoder": ["<s>"]}, "added_tokens_decoder must"),
        ("added_tokens", {"<s>": "one"}, r"added_tokens\.json must map"),
        ("special_tokens_map", ["<s>"], r"special_tokens_map\.json must contain a JSON object"),
    ],
)
def test_files_that_are_wrong(file, values, message, tmp_path):
    backend = Backend(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(written(tmp_path, backend, **{file: values}))


# --- who begins with bos ------------------------------------------------------------------------


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("add_bos_token", [None, False, True])
def test_the_tokenizers_own_habit(template, add_bos_token, tmp_path):
    backend = byte_level(False)
    config = dict(BASE) if add_bos_token is None else {**BASE, "add_bos_token": add_bos_token}
    backend = with_template(backend) if template else backend
    ours, theirs = both(written(tmp_path, backend, tokenizer_config=config))
    bare = ours.encode("the fox")
    assert ours.encode("the fox", "auto") == ids_of(theirs, "the fox", special=True)
    assert ours.encode("the fox", True) == ours.encode("the fox", "true") == [1, *bare]
    assert ours.encode("the fox", False) == ours.encode("the fox", "false") == bare
    assert ours.encode_batch(["the fox"], "auto") == [ours.encode("the fox", "auto")]
    assert ours.adds_bos("auto") == template
    # Never two.
    for setting in (True, "auto", False):
        assert ours.encode("<s>the fox", setting) == [1, *bare]
    with pytest.raises(ValueError, match="add_bos must be"):
        ours.encode("", "yes")


def test_a_template_may_put_more_than_bos(tmp_path):
    backend = byte_level(False)
    backend.post_processor = processors.TemplateProcessing(
        single="<unk> <s> $A </s>", special_tokens=[("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    )
    ours = Tokenizer.from_folder(written(tmp_path, backend))
    assert ours.bos_prefix == (0, 1)
    assert ours.encode("a", "auto") == ours.encode("a", True) == [0, 1, *ours.encode("a")]


@pytest.mark.parametrize("template", [False, True])
def test_generate_begins_as_the_tokenizer_does(template, tmp_path):
    write_tiny_folder(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
        backend.save(str(tmp_path / "tokenizer.json"))
    model = load_model(tmp_path)
    with_bos, without = ([[1, 5, 7]], [[5, 7]])
    write = lambda prompt, **settings: model.generate(prompt, 3, stop=(), **settings)
    for settings, ids in (
        ({}, with_bos if template else without),
        ({"add_bos": True}, with_bos),
        ({"add_bos": False}, without),
    ):
        found = write("word5 word7", **settings)
        np.testing.assert_array_equal(found, write(np.array(ids)))
    np.testing.assert_array_equal(write("<bos> word5 word7"), write(np.array(with_bos)))


# --- tokenizers of a newer kind -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "SuperBPE2", "vocab": {}}}, "the model of type 'SuperBPE2'"),
        ({"pre_tokenizer": {"type": "Thinker"}}, "the pre_tokenizer of type 'Thinker'"),
        (
            {
                "decoder": {
                    "type": "Sequence",
                    "decoders": [{"type": "Fuse"}, {"type": "Rot13"}, {"type": "Rot14"}],
                }
            },
            "the decoder of type 'Rot13', the decoder of type 'Rot14'",
        ),
        ({"version": "2.0"}, r"the version '2\.0' of the file"),
    ],
)
def test_a_newer_kind_is_named(changes, message, tmp_path):
    import tokenizers

    backend = Backend(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    file = written(tmp_path, backend) / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(backend.to_str()), **changes}))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert f"the installed tokenizers {tokenizers.__version__} cannot read" in str(error.value)
    assert str(file) in str(error.value)
