"""Tokenizers: trained, saved, read back, and the same ids as transformers gives."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from conlens_jax.corpora.stories import story
from conlens_jax.models.tokenizer import (
    Tokenizer,
    train_bpe_tokenizer,
    train_word_tokenizer,
)

STORIES = [story(0, index).text for index in range(300)]
ODD = "Naïve café — 3 × 4 = 12;\n\n\tdef f(x): return 'x'  # 日本語 🙂"


@pytest.fixture(scope="module")
def word():
    return train_word_tokenizer(STORIES, 1024)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe_tokenizer([*STORIES, ODD], 400)


def test_marks_get_ids_after_the_words():
    plain = train_word_tokenizer(["b b b , a a c"], 7)
    marked = train_word_tokenizer(["b b b , a a c"], 7, (",", "|", "·"))
    words = [plain.token(i).strip() for i in range(plain.vocab_size)]
    assert "," not in words[7:] and len(words) == 7
    assert [marked.token(i).strip() for i in range(marked.vocab_size)] == [*words, "|", "·"]
    ids = marked.encode("b , | · a")
    assert len(ids) == 5 and marked.unk_id not in ids and marked.decode(ids) == "b , | · a"


def test_word_tokenizer_gives_the_words_back(word):
    for text in STORIES:
        ids = word.encode(text)
        assert len(ids) == len(text.split())
        assert word.decode(ids) == text
    assert (word.pad_id, word.bos_id, word.eos_id) == (0, 1, 2)
    assert word.vocab_size == 4 + len({w for text in STORIES for w in text.split()})
    assert word.encode("Anna") == word.encode("anna") != [3]
    assert word.encode("zebra") == [3]


def test_word_tokenizer_keeps_the_most_frequent(word):
    tiny = train_word_tokenizer(["b b b a a c"], 6)
    assert [tiny.token(i) for i in range(6)] == ["<pad>", "<bos>", "<eos>", "<unk>", "b", "a"]
    assert tiny.encode("a b c") == [5, 4, 3]


def test_bpe_tokenizer_gives_every_text_back(bpe):
    for text in (*STORIES[:20], ODD, " a  b\n", ""):
        assert bpe.decode(bpe.encode(text)) == text
    assert bpe.vocab_size == 400
    assert (bpe.pad_id, bpe.bos_id, bpe.eos_id) == (0, 1, 2)
    assert len(bpe.encode(STORIES[0])) < 0.5 * len(STORIES[0])


def test_bos_batches_and_special_tokens(word):
    text = STORIES[0]
    assert word.encode(text, add_bos=True) == [1, *word.encode(text)]
    assert word.encode_batch(STORIES[:9]) == [word.encode(text) for text in STORIES[:9]]
    assert word.encode_batch([text], add_bos=True) == [word.encode(text, add_bos=True)]
    assert word.decode([1, *word.encode(text), 2, 0, 0, 5000, -1]) == text


def test_training_is_deterministic(word, bpe):
    assert train_word_tokenizer(STORIES, 1024).fingerprint == word.fingerprint
    assert train_bpe_tokenizer([*STORIES, ODD], 400).fingerprint == bpe.fingerprint
    assert train_word_tokenizer(STORIES, 50).fingerprint != word.fingerprint


def test_printable_tokens(word, bpe):
    assert word.token(2) == "<eos>" and word.token(word.encode("duck")[0]) == "duck"
    assert word.token(5000) == "[5000]" and word.token(-1) == "[-1]"
    newline, half_a_character = bpe.encode("\n")[0], bpe.encode("🦊")[0]
    assert bpe.token(newline) == "\\n"
    for token_id in (*range(bpe.vocab_size), half_a_character):
        token = bpe.token(token_id)
        assert token and token.isprintable() and "\ufffd" not in token
    assert [bpe.token(i) for i in bpe.encode(" the was")] == [" the", " was"]


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_save_load_and_transformers(kind, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = request.getfixturevalue(kind)
    ours.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*STORIES[:20], ODD, "<bos> once upon a time <eos>"):
        assert again.encode(text) == ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        ids = ours.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert theirs.bos_token_id == again.bos_id == 1
    assert theirs.eos_token_id == again.eos_id == 2
    assert theirs.pad_token_id == again.pad_id == 0
    assert theirs.unk_token_id == 3
    assert len(theirs) == again.vocab_size == ours.vocab_size
    assert again.fingerprint == ours.fingerprint
    again.save(tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / name).read_bytes()


# --- tokenizers of other people -----------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path):
    """A folder whose tokenizer.json pads, truncates, and adds tokens around the text."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<extra>"])
    tokenizer.post_processor = processors.BertProcessing(("</s>", 1), ("<s>", 0))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def write(**files):
        for name, values in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return Tokenizer.from_folder(tmp_path)

    return write


def test_nothing_is_added_cut_or_padded(foreign):
    tokenizer = foreign()
    assert tokenizer.encode("a b a b a b") == [3, 4, 3, 4, 3, 4]
    assert tokenizer.encode_batch(["a", "b a"]) == [[3], [4, 3]]
    # Five words, one added token, and the [PAD] that its padding names, as transformers has it.
    assert tokenizer.vocab_size == 7


@pytest.mark.parametrize(
    ("files", "bos_eos_pad"),
    [
        ({}, (None, None, 6)),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}, (0, 1, 6)),
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}, "pad_token": None}}, (1, 1, 1)),
        ({"special_tokens_map": {"eos_token": "</s>", "pad_token": "<extra>"}}, (1, 1, 5)),
        ({"config": {"bos_token_id": 0, "eos_token_id": [1, 5]}}, (0, 1, 6)),
        (
            {
                "tokenizer_config": {"pad_token": None},
                "config": {"text_config": {"eos_token_id": 1, "pad_token_id": 3}},
            },
            (1, 1, 3),
        ),
        ({"config": {"bos_token_id": 3}}, (3, None, 6)),
        # Of two sources the tokenizer's own wins; an id beyond the vocabulary is no token.
        ({"tokenizer_config": {"bos_token": "<s>"}, "config": {"bos_token_id": 3}}, (0, None, 6)),
        (  # A name that the vocabulary has not is a new token.
            {"tokenizer_config": {"bos_token": "<none>"}, "config": {"bos_token_id": 3}},
            (6, None, 7),
        ),
        ({"config": {"bos_token_id": 99, "eos_token_id": 1}}, (1, 1, 6)),
    ],
)
def test_special_ids(files, bos_eos_pad, foreign):
    tokenizer = foreign(**files)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == bos_eos_pad
    assert tokenizer.encode("a", add_bos=True) == [0, 3]  # as its own template does it


# --- bad input ----------------------------------------------------------------------------------


def test_bad_folders(tmp_path, word):
    with pytest.raises(ValueError, match=r"model\.path: there is no tokenizer\.json in"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that can be used"):
        Tokenizer.from_folder(tmp_path)
    word.save(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_ids_beyond_the_embedding_are_refused_where_a_text_uses_one(word, caplog):
    word = Tokenizer(word._json, word._side_files)
    rows = word.encode("zebra duck")[-1]
    for more in (0, 64):
        word.limit_to(word.vocab_size + more)
    assert not caplog.records
    word.limit_to(rows)
    assert f"beyond the {rows} rows" in caplog.text
    assert word.encode("zebra") == [3] and word.encode_batch(["", "zebra"]) == [[], [3]]
    for refused in (lambda: word.encode("zebra duck"), lambda: word.encode_batch(["", "duck"])):
        with pytest.raises(ValueError, match=rf"'duck' with id {rows}, .* only {rows} rows"):
            refused()
    assert (word.pad_id, word.bos_id) == (0, 1)
    word.limit_to(1)  # the pad token alone has a row
    assert (word.pad_id, word.bos_id, word.eos_id) == (0, None, None)


@pytest.mark.parametrize("train", [train_word_tokenizer, train_bpe_tokenizer])
def test_too_small_a_vocabulary(train):
    with pytest.raises(ValueError, match=r"embedded\.vocab_size must be at least"):
        train(STORIES, 4)


def test_marks_of_a_bpe_tokenizer_are_one_token_each(bpe):
    marks = (",", "|", "·")
    marked = train_bpe_tokenizer([*STORIES, ODD], 400, marks)
    ids = [marked.encode(f" {mark}") for mark in marks]
    assert all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == 3
    assert max(ids) >= [bpe.vocab_size]  # after all others
    for text in (*STORIES[:5], ODD, "a | b · c , d", "·|,"):
        assert marked.decode(marked.encode(text)) == text
    assert marked.encode(STORIES[0]) == bpe.encode(STORIES[0])
    assert train_bpe_tokenizer([*STORIES, ODD], 400, ()).fingerprint == bpe.fingerprint
