"""Targets made at dump time: against a plain loop over each row, and through files and caches."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from pipeline import make_world, quick_compilation
from test_extract import Interrupted, all_rows, changed, contents, dump

from conlens_jax.config import ConfigError, TargetConfig, with_changes
from conlens_jax.corpora.generators import GENERATORS
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.corpora.stories import ATTRIBUTES, story
from conlens_jax.corpora.sums import addition
from conlens_jax.data import shared_writer
from conlens_jax.data.cache import ActivationCache
from conlens_jax.data.cache_metadata import CacheError
from conlens_jax.data.cache_writer import CacheWriter
from conlens_jax.data.rows import Rows
from conlens_jax.data.targets.facts import FactTargets
from conlens_jax.data.targets.file import FileTargets
from conlens_jax.data.targets.protocol import NextTokens, filled
from conlens_jax.data.targets.whole_words import WholeWords
from conlens_jax.data.targets.words import WordTargets
from conlens_jax.models.tokenizer import train_bpe_tokenizer, train_word_tokenizer
from conlens_jax.models.written import before_end
from conlens_jax.training.session import open_caches

T = 8
WORDS = {
    "target__kind": "words",
    "target__next_words": 2,
    "target__next_probability": 0.07,
    "target__context_words": 4,
    "target__nearness": 0.05,
    "target__most_common": 1.0,
    "lens__end_token": "<eos>",
    "lens__text_len": T,
    "baseline__steps": 0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world whose model knows the marks between words."""
    with quick_compilation(tmp_path_factory):
        yield make_world(tmp_path_factory.getbasetemp() / "marks", lens__gap_token="·")


@pytest.fixture(scope="module")
def words_cache(world, tmp_path_factory):
    """A finished cache with targets of words, and the session that dumped it."""
    folder = tmp_path_factory.mktemp("words")
    session = changed(world, folder, **WORDS)
    dump(session)
    return session, folder / "cache"


# --- words --------------------------------------------------------------------------------------


def test_words_are_those_of_a_plain_loop(world, words_cache):
    session, folder = words_cache
    config, model, tokenizer = session.config, session.model, session.model.tokenizer
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id}
    is_word = lambda i: i not in special and tokenizer.token(i).isalnum()
    documents = [d.text for d in open_corpus(config.corpus).documents("train")]
    seen_by = Counter()
    for text in documents:
        tokens = tokenizer.encode(text, add_bos=True)[: config.dump.seq_len]
        seen_by.update({i for i in tokens if is_word(i)})
    comma, separator = (tokenizer.encode(mark)[0] for mark in ",|")
    assert tokenizer.token(separator) == "|"
    rows = all_rows(folder / "validation")
    mask_NS = np.arange(rows.tokens_NS.shape[1]) < rows.lengths_N[:, None]
    logits = np.asarray(model.logits(rows.tokens_NS, mask_NS))
    lengths = set()
    for row, at in enumerate(rows.positions_N.tolist()):
        p = np.exp(logits[row, at] - logits[row, at].max())
        p /= p.sum()
        likely = [i for i in np.argsort(-p, kind="stable").tolist() if i != tokenizer.eos_id][:2]
        said = [i for n, i in enumerate(likely) if n == 0 or p[i] >= 0.07]
        expected = said[:1] if len(said) == 1 else [said[0], comma, said[1]]
        score = {}
        for index, token in enumerate(rows.tokens_NS[row, : at + 1].tolist()):
            if is_word(token):
                idf = math.log(len(documents) / max(seen_by[token], 1))
                score[token] = (idf - 0.05 * (at - index), index)  # the last occurrence counts
        room = T - 1 - len(expected) - 1
        best = sorted(score, key=lambda token: score[token], reverse=True)[: min(4, room)]
        named = sorted(best, key=lambda token: score[token][1])
        expected += [separator, *named, tokenizer.eos_id]
        lengths.add(len(expected))
        padded = expected + [tokenizer.eos_id] * (T - len(expected))
        assert rows.targets_NT[row].tolist() == padded
    assert lengths == {7, T}


def test_activations_are_those_without_targets(world, words_cache):
    for split in ("train", "validation"):
        with_targets, without = (all_rows(f / split) for f in (words_cache[1], world.cache))
        np.testing.assert_array_equal(with_targets.tokens_NS, without.tokens_NS)
        np.testing.assert_array_equal(with_targets.positions_N, without.positions_N)
        np.testing.assert_allclose(
            with_targets.activations_ND, without.activations_ND, rtol=1e-5, atol=1e-6
        )
        assert without.targets_NT.shape[1] == 0


def test_interrupted_dump_goes_on_to_the_same_targets(world, words_cache, tmp_path, monkeypatch):
    class Dying(CacheWriter):
        def _write_shard(self, rows, cursor):
            if self._shards:
                raise Interrupted
            return super()._write_shard(rows, cursor)

    session = changed(world, tmp_path, **WORDS)
    monkeypatch.setattr(shared_writer, "CacheWriter", Dying)
    with pytest.raises(Interrupted):
        dump(session)
    monkeypatch.undo()
    assert "resumed_after=" in dump(session)
    assert contents(tmp_path / "cache") == contents(words_cache[1])


TEXT = "The capital of France is Paris. (Tokyo's list[int]) is phased-in, sys.path: naïve 日本 …"
SPLIT = "the capital of france is paris tokyo's list int is phased-in sys.path naïve 日本"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe_tokenizer([story(0, index).text for index in range(40)], 300)


def test_words_of_pieces_are_whole(bpe):
    tokens = [bpe.bos_id, *bpe.encode(TEXT), bpe.eos_id]
    words = list(WholeWords(bpe).of(tokens))
    assert [word.key for word in words] == SPLIT.split()
    assert max(len(word.tokens) for word in words) > 3
    for word in words:
        end = word.last + 1
        assert tuple(tokens[end - len(word.tokens) : end]) == word.tokens
        assert bpe.decode(word.tokens).strip().casefold() == word.key


def test_a_word_is_written_with_a_space_before_it(bpe):
    words = WholeWords(bpe)
    written = [token for word in words.of(bpe.encode(TEXT)) for token in words.after_space(word)]
    assert bpe.decode(written).casefold().split() == SPLIT.split()


def test_words_of_a_word_tokenizer_are_its_tokens():
    tokenizer = train_word_tokenizer(["the cat , the owl ."], 64)
    tokens = tokenizer.encode("the cat , dog . owl", add_bos=True)  # dog is unknown
    found = [(word.key, word.tokens, word.last) for word in WholeWords(tokenizer).of(tokens)]
    assert found == [(w, (tokens[i],), i) for w, i in (("the", 1), ("cat", 2), ("owl", 6))]


def row_of(tokens, position) -> Rows:
    one = lambda value, kind=np.int32: np.array([value], kind)
    tokens_NS = np.array([tokens], np.int32)
    length = one(len(tokens))
    return Rows(np.zeros((1, 2), np.float32), tokens_NS, one(position), length, one(3, np.int64))


def targets_of(tokenizer, text_len, contexts, **changes) -> WordTargets:
    comma, separator = (tokenizer.encode(mark)[0] for mark in (",", "|"))
    config = TargetConfig(kind="words", **{"most_common": 1.0, **changes})
    end = tokenizer.eos_id
    return WordTargets(config, tokenizer, comma, separator, end, text_len, lambda: contexts)


def next_of(*pairs) -> NextTokens:
    ids, probabilities = zip(*pairs, strict=True)
    return NextTokens(np.array([ids], np.int32), np.array([probabilities], np.float32))


def test_recent_tokens_end_the_target(bpe):
    context = bpe.encode("anna saw a brontosaurus and a very old cat")
    position, said = len(context) - 1, next_of((40, 0.9), (41, 0.6), (42, 0.3), (43, 0.1))
    (bar,) = bpe.encode("|")
    pieces = len(bpe.encode(" cat"))
    for text_len, recent in itertools.product(range(8, 40), range(1, pieces + 1)):
        targets = targets_of(bpe, text_len, [context], context_words=8, recent_tokens=recent)
        (text,) = targets.texts(row_of(context, position), said)
        assert len(text) < text_len
        assert text[-recent - 1 :] == [bar, *context[-recent:]]
        assert text.count(bar) == 2  # the first part is never empty, the second may be
        assert text[0] == 40
        named = bpe.decode(text[text.index(bar) + 1 : -recent - 1])
        if recent == pieces:  # what the last part shows is not said twice
            assert "cat" not in named
    assert "brontosaurus" in named


def test_recent_tokens_at_the_beginning_of_a_text_are_as_many_as_there_are(bpe):
    context = bpe.encode("anna saw a cat")
    targets = targets_of(bpe, 9, [context], recent_tokens=3)
    (text,) = targets.texts(row_of(context, 0), next_of((40, 0.9), (41, 0.01)))
    (bar,) = bpe.encode("|")
    assert text == [40, bar, bar, context[0]]


def test_a_word_that_does_not_fit_leaves_its_place_to_the_next(bpe):
    context = bpe.encode("anna saw a brontosaurus and a very old cat")
    common = bpe.encode("a cat and a saw very old anna")
    said = bpe.encode(" the")[0]
    texts = {}
    for text_len in range(3, 40):
        targets = targets_of(bpe, text_len, [common, common, context], nearness=0.0)
        (text,) = targets.texts(row_of(context, len(context) - 1), next_of((said, 0.9), (9, 0.01)))
        assert len(text) < text_len
        texts[text_len] = bpe.decode(text)
    assert texts[3] == " the"
    named = [text.partition("|")[2].split() for text in texts.values()]
    assert all(set(words) <= set(bpe.decode(context).split()) for words in named)
    # Of equal idf the later ones come before; the rarest word is there as soon as it fits.
    assert named[-1] == ["brontosaurus", "very", "old", "cat"]
    first = next(i for i, words in enumerate(named) if "brontosaurus" in words)
    assert named[first] == ["brontosaurus"]
    assert all("brontosaurus" in words for words in named[first:])
    # Until then the next ones that fit, the later of equal score before the others.
    assert [words for words in named[:first] if "cat" in words]


def test_words_that_many_documents_have_are_not_named(bpe):
    contexts = [bpe.encode(text) for text in ("a cat", "a cat", "a dog", "a very old dog")]
    tokens = bpe.encode("a cat saw a very old dog")
    said = next_of((tokens[-1], 0.9))
    named = {}
    for share in (1.0, 0.75, 0.5, 0.25, 0.2):
        targets = targets_of(bpe, 60, contexts, context_words=8, most_common=share)
        (text,) = targets.texts(row_of(tokens, len(tokens) - 1), said)
        named[share] = bpe.decode(text[1:]).replace("|", "").split()
    # Of four documents a is in all, cat and dog in two, very and old in one; saw counts as one.
    assert named[1.0] == ["cat", "saw", "a", "very", "old", "dog"]
    assert named[0.75] == named[0.5] == ["cat", "saw", "very", "old", "dog"]
    assert named[0.25] == ["saw", "very", "old"]
    assert named[0.2] == []  # one document of four is more


def test_a_word_that_goes_on_after_p_is_not_named(bpe):
    tokens = bpe.encode("anna saw a brontosaurus")
    targets = targets_of(bpe, 30, [tokens], nearness=0.0)
    (text,) = targets.texts(row_of(tokens, len(tokens) - 2), next_of((tokens[-1], 0.9)))
    assert bpe.decode(text[1:]) == "| anna saw a"


def test_next_tokens_leave_out_the_end_and_what_is_improbable(bpe):
    likely = [(bpe.eos_id, 0.6), (300 - 1, 0.2), (20, 0.1), (21, 0.04), (22, 0.03)]
    said = lambda **changes: targets_of(bpe, 30, [[]], context_words=0, **changes).texts(
        row_of([5, 6], 1), next_of(*likely)
    )[0]
    comma = bpe.encode(",")[0]
    assert said() == [299, comma, 20]
    assert said(next_words=1) == [299]
    assert said(next_probability=0.5) == [299]
    assert said(next_probability=0.0) == [299, comma, 20, comma, 21, comma, 22]


# --- facts --------------------------------------------------------------------------------------


def test_facts_of_stories_are_the_attributes_stated_so_far_nearest_first():
    documents = [story(5, index) for index in range(30)]
    tokenizer = train_word_tokenizer([d.text for d in documents], 2048, (",",))
    targets = FactTargets(GENERATORS["stories"].variables, tokenizer, None, 64)
    for document in documents:
        words = document.text.split()
        position = len(words) * 2 // 3
        (text,) = targets.texts(row_of(tokenizer.encode(document.text), position))
        before = words[: position + 1][::-1]
        values = {v for v in document.attributes.values() if v in before}
        stated = [tokenizer.token(i).strip() for i in text]
        assert values <= set(stated) and set(stated) <= {
            v for vs in ATTRIBUTES.values() for v in vs
        }
        assert [before.index(word) for word in stated] == sorted(map(before.index, stated))


def test_facts_of_sums_have_the_words_that_identify_them():
    documents = [addition(5, index) for index in range(20)]
    tokenizer = train_word_tokenizer([d.text for d in documents], 128, (",",))
    comma = tokenizer.encode(",")[0]
    variables = GENERATORS["sums"].variables
    for document in documents:
        tokens = tokenizer.encode(document.text)
        for text_len in (8, 64):
            targets = FactTargets(variables, tokenizer, comma, text_len)
            (text,) = targets.texts(row_of(tokens, len(tokens) - 1))
            assert len(text) < text_len
            facts = tokenizer.decode(text).replace(" ,", ",").split(", ")
            known = {" ".join((*v.tag, document.attributes[n])) for n, v in variables.items()}
            assert set(facts) == known if text_len == 64 else set(facts) < known
            assert facts[0] == f"ones {document.attributes['ones']}"


# --- files --------------------------------------------------------------------------------------


def explanations(world) -> dict[tuple[int, int], str]:
    """Of some rows of the world's cache."""
    rows = [all_rows(world.cache / split) for split in ("train", "validation")]
    places = [
        (int(d), int(p)) for r in rows for d, p in zip(r.documents_N, r.positions_N, strict=True)
    ]
    return {
        (document, position): f"the {'very ' * (position % 5)}old story"
        for document, position in places
        if document % 3
    }


def write_jsonl(path, texts):
    lines = ({"document": d, "position": p, "explanation": t} for (d, p), t in texts.items())
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_parquet(path, texts, **columns):
    """One of the public layouts, with activations, as released files have them."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {
        "activation_vector": [[0.5, 1.5]] * len(texts),
        "activation_layer": [1] * len(texts),
        "doc_id": [f"some/corpus-2:train:{document}" for document, _ in texts],
        "n_raw_tokens": [position + 1 for _, position in texts],
    }
    table |= {name: [of(text) for text in texts.values()] for name, of in columns.items()}
    pq.write_table(pa.table(table), path, row_group_size=7)


USER = [{"role": "user", "content": "<concept><INJECT></concept>"}]
LAYOUTS = {
    "av_sft": {
        "prompt": lambda text: USER,
        "response": lambda text: f"<explanation>\n{text}\n</explanation>",
    },
    "ar_sft": {"prompt": lambda text: f"Summary of <text>{text}</text> <summary>"},
    "base": {"api_explanation": lambda text: text},
}


@pytest.mark.parametrize("layout", ["jsonl", *LAYOUTS])
def test_every_layout_gives_the_same_targets(world, tmp_path, layout):
    texts, tokenizer = explanations(world), world.session.model.tokenizer
    path = tmp_path / ("a.jsonl" if layout == "jsonl" else "a.parquet")
    if layout == "jsonl":
        write_jsonl(path, texts)
    else:
        write_parquet(path, texts, **LAYOUTS[layout])
    targets = FileTargets(str(path), tokenizer)
    rows = all_rows(world.cache / "train")
    rows = rows.take(rows.documents_N % 3 > 0)
    places = zip(rows.documents_N.tolist(), rows.positions_N.tolist(), strict=True)
    assert list(targets.texts(rows)) == [tokenizer.encode(texts[place]) for place in places]
    write_jsonl(tmp_path / "b.jsonl", dict(reversed(texts.items())))
    assert targets.content == FileTargets(str(tmp_path / "b.jsonl"), tokenizer).content


def test_dump_has_the_rows_that_have_an_explanation(world, tmp_path):
    texts = explanations(world)
    write_jsonl(tmp_path / "a.jsonl", texts)
    changes = {**WORDS, "target__kind": "file", "target__path": str(tmp_path / "a.jsonl")}
    session = changed(world, tmp_path, **{**changes, "lens__text_len": 5})
    printed = dump(session)
    tokenizer = session.model.tokenizer
    for split in ("train", "validation"):
        rows, all_of_them = all_rows(tmp_path / "cache" / split), all_rows(world.cache / split)
        kept = all_of_them.take(all_of_them.documents_N % 3 > 0)
        np.testing.assert_array_equal(rows.documents_N, kept.documents_N)
        np.testing.assert_array_equal(rows.positions_N, kept.positions_N)
        np.testing.assert_allclose(rows.activations_ND, kept.activations_ND, rtol=1e-5, atol=1e-6)
        found = [before_end(text, tokenizer.eos_id) for text in rows.targets_NT]
        for text, d, p in zip(found, rows.documents_N, rows.positions_N, strict=True):
            assert list(text) == tokenizer.encode(texts[int(d), int(p)])[:5]
    assert "without_target=" in printed and "targets_cut=" in printed
    write_jsonl(tmp_path / "a.jsonl", {**texts, next(iter(texts)): "another"})
    with pytest.raises(CacheError, match="target.explanations: the cache has"):
        dump(session)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"document": 1, "position": 2}', "line 1 has no explanation"),
        ('{"document": 1, "explanation": "a"}', "line 1 has no position"),
        ('{"document": "one", "position": 2, "explanation": "a"}', "document='one'"),
        ("[1]", "must be an object"),
        ("{", "not valid JSON"),
    ],
)
def test_rows_that_cannot_be_read_are_named(world, tmp_path, line, named):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=named) as caught:
        FileTargets(str(path), world.session.model.tokenizer)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(world, tmp_path):
    with pytest.raises(ValueError, match="target.path=.* does not exist"):
        FileTargets(str(tmp_path / "a.jsonl"), world.session.model.tokenizer)


# --- caches with targets ------------------------------------------------------------------------


def test_a_cache_with_targets_records_their_settings(words_cache):
    metadata = ActivationCache.open(words_cache[1] / "train").metadata
    assert metadata.schema_version == 2
    assert metadata.target == {
        "kind": "words",
        "text_len": T,
        "end_token": "<eos>",
        "next_words": 2,
        "next_probability": 0.07,
        "context_words": 4,
        "nearness": 0.05,
        "most_common": 1.0,
        "comma": " ,",
        "separator": TargetConfig().separator,
    }


def test_only_targets_as_asked_for_are_trained_on(world, words_cache, tmp_path):
    session, folder = words_cache
    here = {"dump__cache_dir": str(folder)}
    assert len(open_caches(session)[0]) == len(open_caches(world.session)[0])
    # Windows of the context need no targets, and mind none.
    window = world.changed(tmp_path, **here)
    assert len(open_caches(window)[0]) == world.config.dump.n_samples
    other = world.changed(
        tmp_path, **here, **{**WORDS, "target__nearness": 0.1, "lens__text_len": 9}
    )
    with pytest.raises(CacheError) as caught:
        open_caches(other)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  - lens.text_len: the cache has 8, this run has 9",
        "  - target.nearness: the cache has 0.05, this run has 0.1",
    ]
    with pytest.raises(CacheError, match="target.kind: the cache has no targets, this run has 'w"):
        open_caches(world.changed(tmp_path, **WORDS))
    facts = world.changed(tmp_path, **here, **{**WORDS, "target__kind": "facts"})
    with pytest.raises(
        CacheError, match="target.kind: the cache has 'words', this run has 'facts'"
    ):
        open_caches(facts)


def test_targets_cannot_be_shifted_and_file_documents_are_unique(world):
    of = lambda changes: {name.replace("__", "."): value for name, value in changes.items()}
    with pytest.raises(ConfigError, match="evaluate.audit_shift=2 must be 0"):
        with_changes(world.config, {**of(WORDS), "evaluate.audit_shift": 2})
    file = {"target.kind": "file", "target.path": "a", "corpus.validation_split": "test"}
    with pytest.raises(ConfigError, match="corpus.validation_split=''"):
        with_changes(world.config, {**of(WORDS), **file})


def test_filled_texts():
    found = filled([[5], [], [1, 2, 3, 4]], 3, 9)
    assert found.tolist() == [[5, 9, 9], [9, 9, 9], [1, 2, 3]] and found.dtype == np.int32
