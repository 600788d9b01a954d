"""Corpora: the stories and what is known about them, real text, splits, and bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conlens_jax.config import CorpusConfig
from conlens_jax.corpora import stdlib_docs, stories, story_grammar
from conlens_jax.corpora.corpus import CorpusError, is_held_out
from conlens_jax.corpora.file_search import find_files
from conlens_jax.corpora.opening import open_corpus

STORIES = [stories.story(0, index) for index in range(1500)]
TEXTS = [f"document number {i} has its own words" for i in range(60)]
PINNED_TEXT = (
    "carl met ivan by the mill . ivan was a shy otter . on a stormy evening the shy otter found "
    "a black sword . even the wise gardener from the mill wanted to see it . carl brought pie , "
    "and they played with it all evening . the otter dreamed of the black sword ."
)
PINNED_NATS = 48.731664
PINNED_HELD_OUT = [3, 7, 18, 23, 24, 31, 37, 41, 52]


def both_splits(config):
    corpus = open_corpus(config)
    return [list(corpus.documents(split)) for split in ("train", "validation")]


# --- stories ------------------------------------------------------------------------------------


def test_story_depends_on_seed_and_index_alone():
    assert [stories.story(0, i) for i in (700, 3, 1200)] == [STORIES[i] for i in (700, 3, 1200)]
    assert stories.story(1, 3).text != STORIES[3].text
    assert len({document.text for document in STORIES}) == len(STORIES)


def test_story_zero_is_pinned():
    # Caches and trained models outlive a session: a change of the generator must be noticed.
    assert STORIES[0].text == PINNED_TEXT
    assert STORIES[0].nats == pytest.approx(PINNED_NATS, abs=1e-6)


def test_chooser_counts_every_choice():
    chooser = stories.Chooser(np.random.default_rng(0))
    picked = [chooser.pick("abc") for _ in range(3000)] + [chooser.pick("x")]
    assert chooser.nats == pytest.approx(3000 * math.log(3))
    for letter in "abc":
        assert 900 < picked.count(letter) < 1100


def test_nats_are_the_probability_of_the_derivation(monkeypatch):
    options = []

    class Recorder(stories.Chooser):
        def pick(self, alternatives):
            options.append(len(alternatives))
            return super().pick(alternatives)

    monkeypatch.setattr(stories, "Chooser", Recorder)
    document = stories.story(0, 5)
    assert document == STORIES[5]
    assert document.nats == pytest.approx(sum(math.log(n) for n in options))
    # All attributes, and at least one choice a sentence.
    assert len(options) >= len(stories.ATTRIBUTES) + document.text.count(".")
    # Attributes are uniform; the friend is anybody but the hero.
    sizes = [len(values) for values in stories.ATTRIBUTES.values()]
    assert options[:2] == [sizes[0], sizes[0] - 1] and options[2 : len(sizes)] == sizes[2:]


def test_every_attribute_stands_in_the_text():
    for document in STORIES:
        words = document.text.split()
        assert document.attributes.keys() == stories.ATTRIBUTES.keys()
        for attribute, value in document.attributes.items():
            assert value in words, (attribute, value, document.text)
        assert document.attributes["name"] != document.attributes["friend"]


@pytest.mark.parametrize("attribute", ["name", "friend", "animal", "object"])
def test_attributes_come_back_later(attribute):
    again = 0
    for document in STORIES:
        words = document.text.split()
        places = [i for i, word in enumerate(words) if word == document.attributes[attribute]]
        again += places[-1] - places[0] >= 8
    assert again > 0.7 * len(STORIES)


def test_a_word_tells_its_attribute():
    classes = {name: set(values) for name, values in stories.ATTRIBUTES.items() if name != "friend"}
    assert stories.ATTRIBUTES["friend"] == stories.ATTRIBUTES["name"]
    for (_, one), (_, other) in itertools.combinations(classes.items(), 2):
        assert not one & other
    for document in STORIES:
        expected = set(document.attributes.values())
        told = set(document.text.split()) & set().union(*classes.values())
        assert told == expected, document.text


def test_text_is_plain_separated_words():
    lengths = [len(document.text.split()) for document in STORIES]
    assert 55 <= np.mean(lengths) <= 75 and max(lengths) <= 90 and min(lengths) >= 40
    for document in STORIES:
        assert re.fullmatch(r"[a-z]+(?: (?:[a-z]+|[.,!?]))* [.!?]", document.text), document.text


def test_vocabulary():
    seen = {word for document in STORIES for word in document.text.split()}
    assert 400 <= len(story_grammar.words()) <= 700
    assert seen <= story_grammar.words()
    assert len(seen) > 0.97 * len(story_grammar.words())


def test_articles_and_pronouns():
    wrong_article = re.compile(r"\ba [aeiou]|\ban (?!honest)[^aeiou]|\ba honest")
    girls = {"anna", "bella", "zoe", "wendy"}
    for document in STORIES:
        assert not wrong_article.search(document.text), document.text
        people = {document.attributes["name"], document.attributes["friend"]}
        if people <= girls:
            assert not {"he", "his", "him"} & set(document.text.split()), document.text
        elif people <= {"tom", "max", "finn", "carl"}:
            assert not {"she", "her"} & set(document.text.split()), document.text


def test_every_symbol_of_the_grammar_has_a_rule():
    bound = story_grammar.bindings(STORIES[0].attributes)
    for name, alternatives in story_grammar.RULES.items():
        for symbol in itertools.chain.from_iterable(alternatives):
            assert (
                symbol.islower() or symbol in ".,!?" or symbol in story_grammar.RULES.keys() | bound
            ), name


def test_synonyms_are_both_written_and_symmetric():
    words = [word for document in STORIES for word in document.text.split()]
    values = set().union(*stories.ATTRIBUTES.values())
    for word, other in stories.SYNONYMS.items():
        assert stories.SYNONYMS[other] == word and word not in values
        assert 0.6 < words.count(word) / words.count(other) < 1.6, (word, other)


def test_what_happens_follows_from_the_event():
    repaired = {"broke", "damaged", "ruined", "smashed"}
    for document in STORIES:
        mends = bool({"repair", "fix", "whole", "worked"} & set(document.text.split()))
        assert mends == (document.attributes["event"] in repaired), document.text


# --- splits -------------------------------------------------------------------------------------


def test_split_is_disjoint_complete_and_stable():
    train, validation = both_splits(CorpusConfig(n_documents=600, validation_fraction=0.2))
    held_out = {document.index for document in validation}
    assert sorted(held_out | {document.index for document in train}) == list(range(600))
    assert not held_out & {document.index for document in train}
    assert 80 < len(held_out) < 160
    assert held_out == {i for i in range(600) if is_held_out(0, i, 0.2)}
    # More documents leave the split of the first ones as it was.
    _, more = both_splits(CorpusConfig(n_documents=900, validation_fraction=0.2))
    assert held_out == {document.index for document in more if document.index < 600}
    # The rule itself is pinned: a cache written before must stay disjoint from validation.
    assert [i for i in range(60) if is_held_out(0, i, 0.1)] == PINNED_HELD_OUT


@pytest.mark.parametrize("kind", ["stories", "sums", "text", "jsonl", "parquet", "huggingface"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_start_gives_what_skipping_gives(kind, split, folder):
    corpus = open_corpus(local_config(kind, folder, n_documents=50))
    everything = list(corpus.documents(split))
    assert len(everything) > 5
    for start in (0, 1, 17, 40):
        expected = [document for document in everything if document.index >= start]
        assert list(corpus.documents(split, start)) == expected
    assert list(corpus.documents(split, 1000)) == []


# --- local files --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("\n\n".join(TEXTS[:30]) + "\n \n\n")
    (tmp_path / "text" / "two.txt").write_text("\n\n\n".join(TEXTS[30:]))
    (tmp_path / "jsonl").mkdir()
    lines = [json.dumps({"body": text, "n": i}) for i, text in enumerate(TEXTS)]
    (tmp_path / "jsonl" / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "parquet").mkdir()
    for part in (0, 1):
        table = pyarrow.table({"body": TEXTS[30 * part :][:30], "n": list(range(30))})
        pyarrow.parquet.write_table(table, tmp_path / "parquet" / f"part-{part}.parquet")
    return tmp_path


def local_config(kind, folder, **changes):
    path = {"stories": "", "sums": "", "huggingface": "jsonl"}.get(kind, kind)
    values = dict(kind=kind, path=str(folder / path), text_field="body", validation_fraction=0.3)
    return CorpusConfig(**(values | {"n_documents": 0} | changes))


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "huggingface"])
def test_local_files_are_read_in_order(kind, folder):
    config = local_config(kind, folder)
    documents = sorted(itertools.chain(*both_splits(config)), key=lambda document: document.index)
    assert [document.text for document in documents] == TEXTS
    assert [document.index for document in documents] == list(range(60))
    assert documents[0].nats is None and not documents[0].attributes
    limited = both_splits(local_config(kind, folder, n_documents=20))
    assert sum(map(len, limited)) == 20
    description = open_corpus(config).description()
    assert json.loads(json.dumps(description)) == description
    assert description["kind"] == kind


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_huggingface_reads_a_local_folder(suffix, folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))
    config = local_config("huggingface", folder, path=str(folder / suffix[1:]))
    streamed = both_splits(config)
    downloaded = both_splits(dataclasses.replace(config, streaming=False, n_documents=40))
    assert sum(map(len, streamed)) == 60
    for one, other in zip(streamed, downloaded, strict=True):
        assert [document for document in one if document.index < 40] == other


def test_huggingface_validation_split_of_its_own(tmp_path):
    for split, texts in (("train", TEXTS[:40]), ("test", TEXTS[40:])):
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    config = CorpusConfig(
        kind="huggingface", path=str(tmp_path), validation_split="test", n_documents=0
    )
    train, validation = both_splits(config)
    assert [document.text for document in train] == TEXTS[:40]
    assert [document.text for document in validation] == TEXTS[40:]


def test_empty_rows_keep_their_index(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ({"text": text} for text in ("first", "", None, "fourth"))
    path.write_text("\n\n".join(map(json.dumps, rows)))
    config = CorpusConfig(kind="jsonl", path=str(path), validation_fraction=1e-9)
    documents = list(open_corpus(config).documents("train"))
    assert [(document.index, document.text) for document in documents] == [
        (0, "first"),
        (3, "fourth"),
    ]


def test_find_files(folder):
    assert find_files(str(folder / "text"), ".txt") == sorted((folder / "text").iterdir())
    assert find_files(str(folder / "**" / "o*.txt"), ".txt") == [folder / "text" / "one.txt"]
    assert find_files(str(folder), ".parquet") == sorted((folder / "parquet").iterdir())


# --- the standard library -----------------------------------------------------------------------


def test_docstrings_of_a_library(tmp_path):
    long = "Words of a long paragraph that goes\n    on in another line. " * 4
    module = f'"""{long}\n\n    >>> 1 + 1\n    2\n    """\n\n\ndef small():\n    """Too short."""\n'
    (tmp_path / "b.py").write_text(module)
    other = f'def deep():\n    """Second. {long}"""\n\n\nasync def a():\n    """Third. {long}"""\n'
    (tmp_path / "a.py").write_text("raise SystemExit  # must not run\n" + other)
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text(f'"""In a test. {long}"""')
    (tmp_path / "z.py").write_text(module)  # the same text again
    texts = list(stdlib_docs.docstrings(tmp_path))
    assert [text.split()[0] for text in texts] == ["Second.", "Third.", "Words"]
    paragraph, example = texts[2].split("\n\n")
    assert "\n" not in paragraph and "goes on in another line." in paragraph
    assert example == ">>> 1 + 1\n2"


def test_stdlib_corpus():
    corpus = open_corpus(CorpusConfig(kind="stdlib", n_documents=40, validation_fraction=0.3))
    train = list(corpus.documents("train"))
    assert 20 <= len(train) < 40
    assert all(len(document.text) >= stdlib_docs.MIN_CHARACTERS for document in train)
    assert list(corpus.documents("train", 10)) == [d for d in train if d.index >= 10]
    assert "python" in corpus.description()


# --- bad input ----------------------------------------------------------------------------------


def first_document(**values):
    return next(open_corpus(CorpusConfig(**values)).documents("train"))


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("jsonl", "a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("jsonl", "a.jsonl", '["text"]\n', r"a\.jsonl, line 1: must be a JSON object, not list"),
        ("jsonl", "a.jsonl", '{"b": 1, "a": 2}\n', r"corpus\.text_field='text'.*columns are a, b"),
        ("jsonl", "a.jsonl", '{"text": 1}\n', r"line 1: corpus\.text_field='text' is int"),
        ("jsonl", "a.jsonl", "\n\n", r"empty: corpus\.path="),
        ("text", "a.txt", " \n\n", r"empty: corpus\.path="),
        ("text", "a.txt", b"caf\xe9", r"a\.txt, line 1: not UTF-8 \(byte 4, 0xe9"),
        ("parquet", "a.parquet", "no parquet", r"a\.parquet is not a readable parquet file"),
        ("huggingface", "a.jsonl", '{"b": 1, "a": 2}\n', r"corpus\.text_field='text'.* a, b"),
    ],
)
def test_bad_files(kind, name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    path = str(tmp_path) if kind == "huggingface" else str(tmp_path / name)
    with pytest.raises(CorpusError, match=message):
        list(open_corpus(CorpusConfig(kind=kind, path=path)).documents("train"))


def test_parquet_columns_of_all_files_in_one_message(tmp_path):
    for name, column in (("a", "body"), ("b", "title")):
        table = pyarrow.table({column: ["x"]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "c.parquet")
    with pytest.raises(CorpusError) as error:
        first_document(kind="parquet", path=str(tmp_path))
    for part in ("corpus.text_field", "a.parquet", "body", "b.parquet", "title", "is int64"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "poems"}, r"corpus\.kind must be one of"),
        ({"kind": "text", "path": "nowhere.txt"}, r"corpus\.path='nowhere\.txt' does not exist"),
        ({"kind": "text", "path": "nowhere-*.txt"}, r"no file matching corpus\.path="),
        ({"kind": "huggingface", "path": "./nowhere"}, r"corpus\.path='\./nowhere'"),
        ({"n_documents": 0}, r"corpus\.n_documents"),
        ({"seed": -1}, r"corpus\.seed"),
        ({"n_documents": 3, "validation_fraction": 1.0}, r"train split.*validation_fraction"),
    ],
)
def test_bad_config(values, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CorpusError, match=message):
        first_document(**values)


def test_folder_without_such_files(tmp_path):
    with pytest.raises(CorpusError, match=r"no \*\.jsonl or .* file in the folder corpus\.path="):
        first_document(kind="jsonl", path=str(tmp_path))


def test_unknown_split(tmp_path, folder):
    with pytest.raises(CorpusError, match=r"split must be one of train, validation, not 'test'"):
        open_corpus(CorpusConfig()).documents("test")
    with pytest.raises(CorpusError, match=r"corpus\.split='dev'"):
        first_document(kind="huggingface", path=str(folder / "jsonl"), split="dev")
