"""Copies of a text: counted, and never on both sides of the split, whatever the corpus is."""

from __future__ import annotations

import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora import duplicates, stdlib_docs
from conlens_jax.corpora.corpus import CorpusError, Document, is_held_out, without_copies
from conlens_jax.corpora.duplicates import SeenTexts, Tally, text_hash
from conlens_jax.corpora.generated import GeneratedCorpus, Generator
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.corpora.sums import addition

FRACTION = 0.3
DIFFERENT = [f"document number {i} has its own words" for i in range(12)]
# Copies differ in white space; the order mixes first and later ones.
TEXTS = [text.replace(" ", gap) for gap in (" ", "  ", "\t", " \n ") for text in DIFFERENT]


def expected(texts, fraction=FRACTION):
    """The splits by plain code: the first of the copies decides."""
    first, sides = {}, {"train": [], "validation": []}
    for index, text in enumerate(texts):
        side = "validation" if is_held_out(0, index, fraction) else "train"
        if first.setdefault(tuple(text.split()), side) == side:
            sides[side].append(index)
    return sides


def made_up(kind, folder, monkeypatch):
    """A corpus of that kind with the texts."""
    if kind == "generated":
        generator = Generator(
            kind="texts",
            document=lambda seed, index: Document(index, TEXTS[index]),
            variables={},
            synonyms={},
            rules="",
        )
        config = CorpusConfig(n_documents=len(TEXTS), validation_fraction=FRACTION)
        return GeneratedCorpus(config, generator)
    if kind == "stdlib":
        monkeypatch.setattr(stdlib_docs, "docstrings", lambda root: iter(TEXTS))
    elif kind == "text":
        lines = [text.replace("\n", "\r") for text in TEXTS]
        (folder / "a.txt").write_bytes("\r\n\r\n".join(lines).encode())
    elif kind in ("jsonl", "huggingface"):
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "a.parquet")
    return open_corpus(
        CorpusConfig(kind=kind, path=str(folder), n_documents=0, validation_fraction=FRACTION)
    )


@pytest.mark.parametrize("kind", ["generated", "stdlib", "text", "jsonl", "parquet", "huggingface"])
def test_no_text_is_on_both_sides(kind, tmp_path, monkeypatch):
    corpus, wanted = made_up(kind, tmp_path, monkeypatch), expected(TEXTS)
    left_out = len(TEXTS) - sum(map(len, wanted.values()))
    assert left_out > 5
    words = []
    for split in ("train", "validation"):
        tally = Tally()
        documents = list(corpus.documents(split, tally=tally))
        assert [document.index for document in documents] == wanted[split]
        assert tally == Tally(len(TEXTS), len(TEXTS) - len(DIFFERENT), left_out)
        words.append({tuple(document.text.split()) for document in documents})
        # Going on in the middle gives what skipping gives: what comes before still counts.
        for start in (5, 20, 40):
            rest = [document for document in documents if document.index >= start]
            assert list(corpus.documents(split, start)) == rest
    assert not words[0] & words[1]
    assert all(words)


def test_without_copies_the_index_alone_decides(tmp_path):
    texts = [f"text {i}" for i in range(200)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    corpus = open_corpus(CorpusConfig(kind="text", path=str(tmp_path), validation_fraction=0.2))
    held_out = [document.index for document in corpus.documents("validation")]
    assert held_out == [i for i in range(200) if is_held_out(0, i, 0.2)]


@pytest.mark.parametrize("streaming", [True, False])
def test_training_leaves_out_what_a_validation_split_holds(streaming, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))
    (tmp_path / "data").mkdir()
    train = ["one", "two", " three ", "two", "four", "five"]
    for split, texts in (("train", train), ("test", ["three", "six", "six", "five"])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "data" / f"{split}.jsonl").write_text(rows)
    config = CorpusConfig(
        kind="huggingface",
        path=str(tmp_path / "data"),
        validation_split="test",
        streaming=streaming,
    )
    corpus, tally = open_corpus(config), Tally()
    read = lambda split, **more: [(d.index, d.text) for d in corpus.documents(split, **more)]
    assert read("train", tally=tally) == [(0, "one"), (1, "two"), (3, "two"), (4, "four")]
    assert tally.left_out == 2
    assert read("train", start=2) == [(3, "two"), (4, "four")]
    assert [text for _, text in read("validation")] == ["three", "six", "six", "five"]


def test_a_split_of_nothing_but_copies_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(["the same"] * 50))
    corpus = open_corpus(CorpusConfig(kind="text", path=str(tmp_path), validation_fraction=0.2))
    assert len(list(corpus.documents("train"))) > 30
    with pytest.raises(CorpusError, match=r"validation split \(\d+ are copies of texts in the"):
        list(corpus.documents("validation"))


def test_sums_that_come_twice():
    """The one pair of the default corpus (40,000 sums) that stood on both sides."""
    assert addition(0, 25520).text == addition(0, 31274).text
    assert is_held_out(0, 25520, 0.05) and not is_held_out(0, 31274, 0.05)
    pair, tally = [addition(0, 25520), addition(0, 31274)], Tally()
    assert not list(without_copies(pair, CorpusConfig(kind="sums"), "train", 0, tally))
    assert tally == Tally(read=2, copies=1, left_out=1)


def test_hash_is_of_the_words(monkeypatch):
    random.seed(0)
    words = [random.choice(["a", "bc", "\u00e9", "d" * 20]) for _ in range(300)]
    texts = [
        "".join(word + random.choice([" ", "\n\n", "\t ", "\u2003"]) for word in words)
        for _ in range(5)
    ]
    plain = text_hash(" ".join(words))
    for size in (1, 2, 7, 64, 10_000):
        monkeypatch.setattr(duplicates, "_CHARACTERS_AT_ONCE", size)
        assert {text_hash(text) for text in texts} == {plain}
        assert text_hash("\n " + texts[0]) == plain
        assert text_hash("".join(words)) != plain
    assert text_hash("a b") != text_hash("ab") and text_hash(" ") == text_hash("")


def test_seen_texts_in_table_and_array(monkeypatch):
    monkeypatch.setattr(duplicates, "_LARGEST_TABLE", 8)
    seen, first = SeenTexts(), {}
    rng = np.random.default_rng(0)
    for number in rng.integers(0, 400, 2000):
        held_out = bool(rng.integers(2))
        assert seen.first_side(str(number), held_out) is first.get(number)
        first.setdefault(number, held_out)
    assert len(seen._sorted) > 300  # almost all are in the array


def test_eight_bytes_a_text(monkeypatch):
    monkeypatch.setattr(duplicates, "_LARGEST_TABLE", 100)
    seen = SeenTexts()
    for number in range(5_000):
        seen.first_side(str(number), False)
    assert len(seen._recent) < 600
    assert seen._sorted.nbytes == 8 * (5_000 - len(seen._recent))
