"""Corpus to activation cache: the rows are right, repeatable, and survive an interruption."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from pipeline import open_world, quiet_console

from conlens_jax.config import ConfigError
from conlens_jax.corpora.corpus import SPLITS, CorpusError, Document
from conlens_jax.corpora.stories import story
from conlens_jax.data import extract, shared_writer
from conlens_jax.data.cache import ActivationCache
from conlens_jax.data.cache_metadata import CacheError
from conlens_jax.data.cache_writer import CacheWriter
from conlens_jax.data.rows import Rows
from conlens_jax.data.stream import open_stream
from conlens_jax.training.session import Session


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


def dump(session: Session) -> str:
    """Dumps and returns what was printed."""
    console, stream = quiet_console()
    extract.dump_activations(session.config, session.model, session.spec, session.mesh, console)
    return stream.getvalue()


def changed(world, folder: Path, **changes) -> Session:
    return world.changed(folder / "run", dump__cache_dir=str(folder / "cache"), **changes)


def all_rows(folder: Path) -> Rows:
    cache = ActivationCache.open(folder)
    return cache.rows(np.arange(len(cache)))


def contents(folder: Path) -> dict[str, str]:
    """Name → sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- what a row is ------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation"])
def test_activations_are_the_output_of_the_block(world, split):
    rows = all_rows(world.cache / split)
    mask = np.arange(rows.tokens_NS.shape[1]) < rows.lengths_N[:, None]
    model, layer = world.session.model, world.config.model.layer
    expected = model.capture(rows.tokens_NS, layer, rows.positions_N, mask)
    np.testing.assert_allclose(rows.activations_ND, expected, rtol=1e-4, atol=1e-5)
    other = model.capture(rows.tokens_NS, layer - 1, rows.positions_N, mask)
    assert np.abs(rows.activations_ND - np.asarray(other)).max() > 0.01


def test_contexts_are_the_documents(world):
    rows, tokenizer = all_rows(world.cache / "train"), world.session.model.tokenizer
    config = world.config
    for row in range(0, len(rows), 17):
        document = story(config.corpus.seed, int(rows.documents_N[row]))
        tokens = tokenizer.encode(document.text, add_bos=True)[: config.dump.seq_len]
        length = int(rows.lengths_N[row])
        assert rows.tokens_NS[row, :length].tolist() == tokens
        assert (rows.tokens_NS[row, length:] == tokenizer.pad_id).all()


def test_positions_are_in_range_distinct_and_several_a_document(world):
    for split in SPLITS:
        rows, config = all_rows(world.cache / split), world.config.dump
        assert (rows.positions_N >= config.min_position).all()
        assert (rows.positions_N + config.after < rows.lengths_N).all()
        pairs = list(zip(rows.documents_N.tolist(), rows.positions_N.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        counts = np.unique(rows.documents_N, return_counts=True)[1]
        assert counts.max() == config.positions_per_sequence
        assert len(set(rows.positions_N.tolist())) > 15  # spread over the range


def test_max_position_and_min_position_are_reached_and_not_passed(world, tmp_path):
    changes = {"dump__min_position": 10, "dump__max_position": 12}
    dump(changed(world, tmp_path, dump__positions_per_sequence=3, **changes))
    rows = all_rows(tmp_path / "cache" / "train")
    assert set(rows.positions_N.tolist()) == {10, 11, 12}


def test_splits_share_no_document(world):
    train, validation = (all_rows(world.cache / split) for split in SPLITS)
    assert len(train) == world.config.dump.n_samples
    assert len(validation) == world.config.dump.n_validation_samples
    assert not set(train.documents_N.tolist()) & set(validation.documents_N.tolist())


def test_test_rows_are_of_the_held_out_documents_after_those_of_validation(world, tmp_path):
    session = changed(world, tmp_path, dump__n_test_samples=24)
    dump(session)
    parts = {split: all_rows(tmp_path / "cache" / split) for split in (*SPLITS, "test")}
    for split in SPLITS:  # the same bytes with and without a test split
        assert contents(tmp_path / "cache" / split) == contents(world.cache / split)
    assert len(parts["test"]) == 24
    longer = changed(world, tmp_path / "longer", dump__n_validation_samples=64 + 24)
    dump(longer)
    validation = all_rows(tmp_path / "longer" / "cache" / "validation")
    assert parts["test"].documents_N[0] > parts["validation"].documents_N.max()
    for document in np.unique(parts["test"].documents_N)[:3]:
        here, there = (
            rows.take(rows.documents_N == document) for rows in (parts["test"], validation)
        )
        np.testing.assert_array_equal(here.positions_N, there.positions_N)
        np.testing.assert_allclose(here.activations_ND, there.activations_ND, rtol=1e-4, atol=1e-5)


def test_no_held_out_document_left_for_the_test_split(world, tmp_path):
    session = changed(
        world,
        tmp_path,
        **lines_corpus(tmp_path, [30] * 20),
        dump__n_test_samples=8,
        dump__n_validation_samples=1_000,
    )
    with pytest.raises(CorpusError, match="n_validation_samples=1000 leaves no held-out document"):
        dump(session)


def test_seed_decides_the_positions(world, tmp_path):
    dump(changed(world, tmp_path / "a"))
    assert contents(tmp_path / "a" / "cache") == contents(world.cache)
    dump(changed(world, tmp_path / "b", dump__seed=1))
    here, other = (all_rows(f / "train") for f in (world.cache, tmp_path / "b" / "cache"))
    np.testing.assert_array_equal(here.documents_N, other.documents_N)
    assert (here.positions_N != other.positions_N).mean() > 0.5


def test_batch_size_changes_nothing_but_rounding(world, tmp_path):
    dump(changed(world, tmp_path, dump__batch_size=24))
    for split in SPLITS:
        here, other = all_rows(world.cache / split), all_rows(tmp_path / "cache" / split)
        for name in ("tokens_NS", "positions_N", "lengths_N", "documents_N"):
            np.testing.assert_array_equal(getattr(here, name), getattr(other, name))
        np.testing.assert_allclose(here.activations_ND, other.activations_ND, rtol=1e-4, atol=1e-5)


def test_bfloat16_rows_are_the_rounded_float32_rows(world, tmp_path):
    dump(changed(world, tmp_path, dump__dtype="bfloat16"))
    cache = ActivationCache.open(tmp_path / "cache" / "train")
    assert cache.metadata.dtype == "bfloat16"
    rounded = np.asarray(
        jnp.asarray(all_rows(world.cache / "train").activations_ND).astype(jnp.bfloat16)
    )
    found = all_rows(tmp_path / "cache" / "train").activations_ND
    np.testing.assert_array_equal(found, rounded.astype(np.float32))
    shard = next((tmp_path / "cache" / "train").glob("shard-*"))
    assert shard.stat().st_size < next((world.cache / "train").glob("shard-*")).stat().st_size


def test_without_bos_a_context_begins_with_the_text(world, tmp_path):
    dump(changed(world, tmp_path, dump__add_bos=False))
    rows, tokenizer = all_rows(tmp_path / "cache" / "train"), world.session.model.tokenizer
    assert (all_rows(world.cache / "train").tokens_NS[:, 0] == tokenizer.bos_id).all()
    assert (rows.tokens_NS[:, 0] != tokenizer.bos_id).all()
    # The default is the embedded tokenizer's own habit, and recorded as older caches have it.
    assert world.config.dump.add_bos == "auto"
    recorded = ActivationCache.open(world.cache / "train").metadata.dump["add_bos"]
    without = ActivationCache.open(tmp_path / "cache" / "train").metadata.dump["add_bos"]
    assert (recorded, without) == (True, False)


def test_metadata_says_who_made_it(world):
    metadata = ActivationCache.open(world.cache / "train").metadata
    model = world.session.model
    assert (metadata.model_id, metadata.weights_hash) == (model.model_id, model.weights_hash)
    assert metadata.tokenizer_hash == model.tokenizer.fingerprint
    assert (metadata.layer, metadata.d_model) == (1, 16)
    assert metadata.dump["min_position"] == 8 and metadata.corpus["kind"] == "stories"
    text = json.dumps(metadata.corpus) + json.dumps(metadata.dump) + metadata.model_id
    assert str(world.root) not in text  # no folder of this machine


# --- interruptions and caches that are there ----------------------------------------------------


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("shards_before", [1, 3])
def test_interrupted_dump_goes_on_to_the_same_bytes(world, tmp_path, monkeypatch, shards_before):
    written = []

    class Dying(CacheWriter):
        def _write_shard(self, rows, cursor):
            if len(written) == shards_before:
                raise Interrupted
            written.append(cursor)
            return super()._write_shard(rows, cursor)

    session = changed(world, tmp_path)
    monkeypatch.setattr(shared_writer, "CacheWriter", Dying)
    with pytest.raises(Interrupted):
        dump(session)
    monkeypatch.undo()
    assert (tmp_path / "cache" / "train.partial").is_dir()
    assert not (tmp_path / "cache" / "train").exists()
    printed = dump(session)
    assert f"resumed_after={shards_before * world.config.dump.rows_per_shard}" in printed
    assert contents(tmp_path / "cache") == contents(world.cache)


def test_finished_cache_is_found_and_not_touched(world, tmp_path, monkeypatch):
    copied = world.copy_cache(tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    monkeypatch.setattr(extract, "_capture_at", None)  # would fail if it were called
    printed = dump(changed(world, tmp_path))
    assert printed.count("found=") == 2
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dump__min_position": 9}, "dump.min_position: the cache has 8, asked for is 9"),
        ({"dump__n_samples": 200}, "dump.n_samples: the cache has 192, asked for is 200"),
        ({"model__layer": 0}, "model.layer: the cache has 1, asked for is 0"),
        ({"corpus__seed": 5}, "corpus.seed: the cache has 0, asked for is 5"),
        ({"dump__dtype": "bfloat16"}, "dump.dtype"),
    ],
)
def test_cache_of_other_settings_is_an_error_and_stays(world, tmp_path, changes, named):
    copied = world.copy_cache(tmp_path / "cache")
    with pytest.raises(CacheError) as caught:
        dump(changed(world, tmp_path, **changes))
    assert named in str(caught.value) and "dump.cache_dir" in str(caught.value)
    assert contents(copied) == contents(world.cache)


def test_partial_dump_of_other_settings_is_an_error(world, tmp_path):
    (world.copy_cache(tmp_path / "cache") / "train").rename(tmp_path / "cache" / "gone")
    partial = tmp_path / "cache" / "train.partial"
    writer = CacheWriter(
        tmp_path / "cache" / "train", ActivationCache.open(world.cache / "train").metadata, 48
    )
    writer.append(all_rows(world.cache / "train"), list(range(192)))
    before = contents(partial)
    with pytest.raises(CacheError, match="dump.seed: the cache has 0, asked for is 3"):
        dump(changed(world, tmp_path, dump__seed=3))
    assert contents(partial) == before


# --- corpora and settings that do not fit -------------------------------------------------------


def lines_corpus(folder: Path, lengths: list[int]) -> dict:
    """Changes for a corpus of one document a line, of so many words each, no two the same."""
    file = folder / "lines.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = [
        " ".join([f"word{number}"] + ["the"] * (length - 1))
        for number, length in enumerate(lengths)
    ]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {
        "corpus__kind": "jsonl",
        "corpus__path": str(file),
        "corpus__n_documents": 0,
        "corpus__validation_fraction": 0.5,
    }


def test_documents_that_are_all_too_short(world, tmp_path):
    session = changed(world, tmp_path, **lines_corpus(tmp_path, [3] * 20))
    with pytest.raises(CorpusError) as caught:
        dump(session)
    for part in ("dump.min_position=8", "dump.after=4", "corpus.path"):
        assert part in str(caught.value)
    assert not (tmp_path / "cache" / "train").exists()


def test_the_shortest_document_that_has_a_position(world, tmp_path):
    """8 tokens before P, P itself and 4 behind it make 13, one of them bos."""
    lengths = [11, 12] * 20
    dump(changed(world, tmp_path, **lines_corpus(tmp_path, lengths)))
    rows = [all_rows(tmp_path / "cache" / split) for split in SPLITS]
    documents = np.concatenate([part.documents_N for part in rows])
    assert sorted(documents.tolist()) == list(range(1, 40, 2))  # those of 12 words and bos
    assert all((part.positions_N == 8).all() and (part.lengths_N == 13).all() for part in rows)


def test_short_documents_are_counted(world, tmp_path):
    printed = dump(changed(world, tmp_path, **lines_corpus(tmp_path, [3, 30] * 20)))
    counts = [int(part.split("=")[1]) for part in printed.split() if part.startswith("too_short=")]
    assert sum(counts) == 20 and min(counts) > 0


def test_copies_and_a_long_document(world, tmp_path):
    """Counted in the log, on one side only, the contexts right; and the stream gives the same."""
    words = "the old dog ran after a small cat by the mill on a stormy evening".split()
    different = [" ".join([f"number{i}", *words]) for i in range(12)]
    different[5] += " and then" * 20_000
    texts = different + [text.replace(" ", "  ") for text in different]
    changes = lines_corpus(tmp_path, [1])
    Path(changes["corpus__path"]).write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    session = changed(world, tmp_path, **changes)
    printed = dump(session)
    assert printed.count(" duplicates=12 duplicates_left_out=") == 2
    splits = [all_rows(tmp_path / "cache" / split) for split in SPLITS]
    sides = [{texts[i].split()[0] for i in rows.documents_N.tolist()} for rows in splits]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 12
    tokenizer, seq_len = session.model.tokenizer, session.config.dump.seq_len
    for rows in splits:
        for tokens, length, document in zip(
            rows.tokens_NS, rows.lengths_N, rows.documents_N, strict=True
        ):
            expected = tokenizer.encode(texts[document], add_bos=True)[:seq_len]
            assert tokens[:length].tolist() == expected
    console, stream = quiet_console()
    streamed = open_stream(session.config, session.model, session.spec, session.mesh, console)
    assert "duplicates=12" in stream.getvalue()
    for rows, source in zip(splits, streamed, strict=True):
        found = source.rows(np.arange(len(source)))
        for name in ("tokens_NS", "positions_N", "lengths_N", "documents_N"):
            np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))


def test_long_documents_are_tokenised_few_at_once(monkeypatch):
    monkeypatch.setattr(extract, "_CHARACTERS_AT_ONCE", 1000)
    documents = [Document(i, "x" * size) for i, size in enumerate([10] * 300 + [600] * 3)]
    sizes = [len(chunk) for chunk in extract._chunks(iter(documents))]
    assert sizes == [100, 100, 100, 2, 1]


def test_corpus_smaller_than_asked_for_is_said_and_works(world, tmp_path):
    session = changed(world, tmp_path, dump__n_samples=5_000)
    printed = dump(session)
    found = len(ActivationCache.open(tmp_path / "cache" / "train"))
    assert 192 < found < 5_000
    assert f"the corpus has only {found} of 5000 rows" in printed
    assert "found=" in dump(session)  # and the shorter cache is this config's cache


def test_layer_out_of_range_is_named(world, tmp_path):
    with pytest.raises(ValueError, match=r"model\.layer=3 is out of range.*0 to 2"):
        changed(world, tmp_path, model__path="elsewhere", model__layer=3)


def test_batch_that_does_not_divide_over_the_devices(world, tmp_path):
    session = changed(world, tmp_path, dump__batch_size=12)
    with pytest.raises(ConfigError, match="dump.batch_size=12 must be a multiple of"):
        dump(session)
