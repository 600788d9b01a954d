"""The activation cache: what is written is what is read, whatever happens in between."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from conlens_jax.data import cache_writer
from conlens_jax.data.cache import ActivationCache
from conlens_jax.data.cache_metadata import CacheError, CacheMetadata, cache_is_complete
from conlens_jax.data.cache_writer import CacheWriter
from conlens_jax.data.rows import Rows
from conlens_jax.data.shared_writer import SharedWriter
from conlens_jax.files import whole as whole_files

N_ROWS, D_MODEL, SEQ_LEN, PER_SHARD = 23, 5, 7, 6


def make_rows(n_rows: int = N_ROWS, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, SEQ_LEN + 1, n_rows)
    return Rows(
        # 1e30 is far outside float16's range and inside bfloat16's.
        activations_ND=(rng.normal(size=(n_rows, D_MODEL)) * 1e30).astype(np.float32),
        tokens_NS=rng.integers(0, 50_000, (n_rows, SEQ_LEN)).astype(np.int32),
        positions_N=(lengths - 2).astype(np.int32),
        lengths_N=lengths.astype(np.int32),
        documents_N=rng.integers(0, 2**62, n_rows),
    )


def make_metadata(**changes) -> CacheMetadata:
    metadata = CacheMetadata(
        model_id="tiny",
        weights_hash="w0",
        tokenizer_hash="t0",
        layer=2,
        d_model=D_MODEL,
        seq_len=SEQ_LEN,
        dtype="float32",
        corpus={"kind": "stories", "sizes": (1, 2)},
        split="train",
        dump={"min_position": 8},
        seed=3,
    )
    return dataclasses.replace(metadata, **changes)


def dump(folder: Path, rows: Rows, metadata: CacheMetadata, step: int = 4, stop: int | None = None):
    """What a dump does: goes on behind the cursor, in batches; abandons the writer at ``stop``."""
    writer = CacheWriter(folder, metadata, PER_SHARD)
    start = 0 if writer.cursor is None else writer.cursor["row"] + 1
    assert start == writer.rows_written
    for begin in range(start, len(rows), step):
        if stop is not None and begin >= stop:
            break
        part = rows.take(slice(begin, begin + step))
        writer.append(part, [{"row": begin + i} for i in range(len(part))])
    return writer.finish() if stop is None else None


def assert_same_rows(found: Rows, expected: Rows) -> None:
    for field in dataclasses.fields(Rows):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert one.dtype == other.dtype, field.name
        assert one.shape == other.shape, field.name
        assert one.tobytes() == other.tobytes(), field.name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    rows = make_rows()
    dump(tmp_path / "cache", rows, make_metadata(dtype=dtype))
    cache = ActivationCache.open(tmp_path / "cache")
    stored = rows.activations_ND.astype(dtype if dtype == "float32" else ml_dtypes.bfloat16)
    assert np.isfinite(stored).all()
    expected = dataclasses.replace(rows, activations_ND=stored.astype(np.float32))
    assert len(cache) == N_ROWS
    assert [shard.rows for shard in cache.metadata.shards] == [6, 6, 6, 5]
    assert_same_rows(cache.rows(np.arange(N_ROWS)), expected)
    mixed = np.array([22, 0, 7, 7, 5, 6, 17, 1])
    assert_same_rows(cache.rows(mixed), expected.take(mixed))
    assert len(cache.rows([])) == 0


def test_bfloat16_rows_are_accepted_and_half_the_size(tmp_path):
    rows = make_rows()
    narrow = dataclasses.replace(
        rows, activations_ND=rows.activations_ND.astype(ml_dtypes.bfloat16)
    )
    dump(tmp_path / "a", rows, make_metadata(dtype="bfloat16"))
    dump(tmp_path / "b", narrow, make_metadata(dtype="bfloat16"))
    dump(tmp_path / "c", rows, make_metadata())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    difference = [
        c.n_bytes - a.n_bytes
        for a, c in zip(
            ActivationCache.open(tmp_path / "a").metadata.shards,
            ActivationCache.open(tmp_path / "c").metadata.shards,
            strict=True,
        )
    ]
    # The header is a few bytes different, padded to 8.
    assert all(
        abs(found - 2 * n * D_MODEL) <= 8 for found, n in zip(difference, [6, 6, 6, 5], strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_are_valid_safetensors(tmp_path, dtype):
    rows = make_rows()
    dump(tmp_path / "cache", rows, make_metadata(dtype=dtype))
    pytest.importorskip("torch")
    with safe_open(tmp_path / "cache" / "shard-00001.safetensors", framework="pt") as file:
        without_targets = {field.name for field in dataclasses.fields(Rows)} - {"targets_NT"}
        assert set(file.keys()) == without_targets
        assert np.array_equal(file.get_tensor("tokens_NS").numpy(), rows.tokens_NS[6:12])
        assert np.array_equal(file.get_tensor("documents_N").numpy(), rows.documents_N[6:12])
        stored = file.get_tensor("activations_ND").float().numpy()
    narrow = rows.activations_ND.astype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    assert np.array_equal(stored, narrow[6:12].astype(np.float32))


@pytest.mark.parametrize("stop", [0, 4, 8, 12, 20])
@pytest.mark.parametrize("step", [4, 15])
def test_resumed_dump_is_byte_identical(tmp_path, stop, step):
    rows, metadata = make_rows(), make_metadata()
    dump(tmp_path / "whole", rows, metadata)
    dump(tmp_path / "cut", rows, metadata, step=step, stop=stop)
    assert not (tmp_path / "cut").exists()
    dump(tmp_path / "cut", rows, metadata)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists()


def test_resume_starts_behind_the_last_whole_shard(tmp_path):
    rows, metadata = make_rows(), make_metadata()
    dump(tmp_path / "cut", rows, metadata, stop=16)  # 16 rows appended, 12 in whole shards
    writer = CacheWriter(tmp_path / "cut", metadata, PER_SHARD)
    assert (writer.rows_written, writer.rows_appended) == (12, 12)
    assert writer.cursor == {"row": 11}
    writer.append(rows.take(slice(12, 14)), [{"row": 12}, {"row": np.int64(13)}])
    assert (writer.rows_written, writer.rows_appended) == (12, 14)


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it to tidy up in a clever way."""


@pytest.mark.parametrize("n_renames", range(9))
def test_killed_at_any_rename(tmp_path, monkeypatch, n_renames):
    """Every file becomes visible by a rename, so a kill between two of them is every case."""
    rows, metadata = make_rows(), make_metadata()
    dump(tmp_path / "whole", rows, metadata)
    left = iter(range(n_renames))

    def dying(real):
        def rename(*args):
            if next(left, None) is None:
                raise Killed
            real(*args)

        return rename

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(os, "rename", dying(os.rename))
        # 3 shards with their progress, the short one, metadata.json, and the folder: 9 renames,
        # so the last of these runs is killed at the very last one.
        with pytest.raises(Killed):
            dump(tmp_path / "cut", rows, metadata)
    (tmp_path / "cut.partial" / "shard-00009.safetensors.tmp").write_bytes(b"left by a kill")
    dump(tmp_path / "cut", rows, metadata)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_damaged_partial_shard_is_dumped_again(tmp_path, caplog):
    rows, metadata = make_rows(), make_metadata()
    dump(tmp_path / "whole", rows, metadata)
    dump(tmp_path / "cut", rows, metadata, stop=20)
    shard = tmp_path / "cut.partial" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    dump(tmp_path / "cut", rows, metadata)
    assert "shard-00001" in caplog.text
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_finished_cache_is_recognised_and_never_overwritten(tmp_path):
    rows, metadata, folder = make_rows(), make_metadata(), tmp_path / "cache"
    assert not cache_is_complete(folder, metadata)
    finished = dump(folder, rows, metadata)
    before = contents(folder)
    assert cache_is_complete(folder, metadata)
    assert cache_is_complete(folder, finished)
    assert cache_is_complete(folder, dataclasses.replace(metadata, model_id="moved/elsewhere"))
    with pytest.raises(CacheError, match="already complete"):
        CacheWriter(folder, metadata, PER_SHARD)
    other = make_metadata(layer=1, dump={"min_position": 9}, weights_hash="w1", model_id="other")
    for function in (cache_is_complete, lambda *a: CacheWriter(*a, PER_SHARD)):
        with pytest.raises(CacheError, match="dump.cache_dir") as caught:
            function(folder, other)
        for name in ("model.layer", "model.path", "hash of the weights", "dump.min_position"):
            assert name in str(caught.value)
        assert "dump.seed" not in str(caught.value)
    assert contents(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(CacheError, match="not an activation cache"):
        CacheWriter(tmp_path / "mine", metadata, PER_SHARD)


def test_partial_of_other_settings(tmp_path):
    rows, folder = make_rows(), tmp_path / "cut"
    dump(folder, rows, make_metadata(), stop=12)
    with pytest.raises(CacheError, match=r"cut\.partial.*other settings") as caught:
        CacheWriter(folder, make_metadata(seed=4, corpus={"kind": "text"}), PER_SHARD)
    assert "dump.seed: the cache has 3, asked for is 4" in str(caught.value)
    assert "corpus.sizes" in str(caught.value)
    with pytest.raises(CacheError, match="rows_per_shard"):
        CacheWriter(folder, make_metadata(), PER_SHARD + 1)
    assert CacheWriter(folder, make_metadata(), PER_SHARD).rows_written == 12


@pytest.mark.parametrize("verify", [True, "sizes"])
def test_damaged_shards_are_reported_together(tmp_path, verify):
    folder = tmp_path / "cache"
    dump(folder, make_rows(), make_metadata())
    (folder / "shard-00000.safetensors").unlink()
    truncated = folder / "shard-00001.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-8])
    altered = folder / "shard-00003.safetensors"
    altered.write_bytes(altered.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CacheError) as caught:
        ActivationCache.open(folder, verify=verify)
    message = str(caught.value)
    assert "shard-00000.safetensors: missing" in message
    assert "shard-00001.safetensors" in message and "bytes instead of" in message
    assert "shard-00002" not in message
    assert ("shard-00003.safetensors: altered" in message) == (verify is True)


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_shard_that_changes_while_it_is_read_is_named(tmp_path, damage):
    """Cut, a mapped read would end the process; altered, other rows would be read."""
    rows = make_rows()
    dump(tmp_path / "cache", rows, make_metadata())
    shard = tmp_path / "cache" / "shard-00001.safetensors"
    os.utime(shard, (1, 1))  # times of files are coarse
    cache = ActivationCache.open(tmp_path / "cache")
    cache.rows(range(N_ROWS))
    whole = shard.read_bytes()
    cut, altered = whole[: len(whole) // 2], whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    with shard.open("r+b") as file:  # in place: the mapping sees it
        file.write(altered)
        file.truncate(len(cut if damage == "cut" else whole))
    cache.rows(range(PER_SHARD))  # another shard
    how = "bytes instead" if damage == "cut" else "altered"
    said = rf"was damaged while it was read.*\n.*shard-00001.*{how}"
    for read in (lambda: cache.rows([PER_SHARD]), lambda: list(cache.places())):
        with pytest.raises(CacheError, match=said):
            read()
    shard.write_bytes(whole)
    assert_same_rows(cache.rows(range(N_ROWS)), rows)
    shard.rename(shard.with_suffix(".old"))
    shard.write_bytes(whole)  # another file with the same bytes
    assert_same_rows(cache.rows(range(N_ROWS)), rows)
    shutil.rmtree(tmp_path / "cache")
    assert_same_rows(cache.rows(range(N_ROWS)), rows)  # what is mapped stays


def test_open_explains_what_is_not_there(tmp_path):
    with pytest.raises(CacheError, match=r"run conlens_jax\.dump first"):
        ActivationCache.open(tmp_path / "cache")
    dump(tmp_path / "cache", make_rows(), make_metadata(), stop=8)
    with pytest.raises(CacheError, match="interrupted"):
        ActivationCache.open(tmp_path / "cache")


def test_unknown_schema_and_keys(tmp_path):
    folder = tmp_path / "cache"
    dump(folder, make_rows(), make_metadata())
    path = folder / "metadata.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema_version": 99, "new": 1}))
    with pytest.raises(CacheError, match="schema_version 99"):
        ActivationCache.open(folder)
    renamed = {**values, "layers": values["layer"]}
    del renamed["layer"]
    path.write_text(json.dumps(renamed))
    with pytest.raises(CacheError, match="unknown key 'layers'; missing key 'layer'"):
        ActivationCache.open(folder)
    path.write_text(json.dumps({**values, "n_rows": N_ROWS + 1}))
    with pytest.raises(CacheError, match="n_rows=24, but its shards contain 23"):
        ActivationCache.open(folder)
    outside = [{**shard, "file": "../" + shard["file"]} for shard in values["shards"]]
    path.write_text(json.dumps({**values, "shards": outside}))
    with pytest.raises(CacheError, match="directly in the cache folder"):
        ActivationCache.open(folder)


def test_check_lists_every_mismatch(tmp_path):
    dump(tmp_path / "cache", make_rows(), make_metadata())
    cache = ActivationCache.open(tmp_path / "cache")
    cache.check(model_id="tiny", weights_hash="w0", tokenizer_hash="t0", layer=2, d_model=D_MODEL)
    cache.check(model_id="a/copy/of/tiny", weights_hash="w0")
    with pytest.raises(ValueError, match="dump again or point dump.cache_dir") as caught:
        cache.check(model_id="big", weights_hash="w1", tokenizer_hash="t1", layer=3, d_model=6)
    message = str(caught.value)
    for line in (
        "model.path: the cache has 'tiny', this run has 'big'",
        "hash of the weights): the cache has 'w0'",
        "tokenizer (hash): the cache has 't0'",
        "model.layer: the cache has 2, this run has 3",
        "d_model): the cache has 5, this run has 6",
    ):
        assert line in message


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("full_file", ["shard-00002.safetensors", "progress.json", "metadata.json"])
def test_disk_full(tmp_path, monkeypatch, full_file, code):
    rows, metadata = make_rows(), make_metadata()
    dump(tmp_path / "whole", rows, metadata)
    dump(tmp_path / "cut", rows, metadata, stop=12)  # the first two shards fit
    real = whole_files.write_atomically

    def write(path, chunks):
        def full():
            yield b"what still fits"
            raise OSError(code, "full")

        return real(path, full() if path.name == full_file else chunks)

    safe = 12 if full_file != "metadata.json" else 18
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "write_atomically", write)
        with pytest.raises(OSError, match=f"{safe} rows in {safe // 6} shards are safe") as caught:
            dump(tmp_path / "cut", rows, metadata)
        assert caught.value.errno == code
    partial = tmp_path / "cut.partial"
    assert not list(partial.glob("*.tmp"))
    assert CacheWriter(tmp_path / "cut", metadata, PER_SHARD).rows_written == safe
    dump(tmp_path / "cut", rows, metadata)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_killed_between_the_last_rename_and_its_tidying(tmp_path):
    """The cache is finished by then; the next dump removes what was left of the progress."""
    rows, metadata = make_rows(), make_metadata()
    dump(tmp_path / "whole", rows, metadata)
    dump(tmp_path / "cut", rows, metadata)
    (tmp_path / "cut" / cache_writer.PROGRESS_FILE).write_text("{}")
    assert SharedWriter(tmp_path / "cut", metadata, PER_SHARD).complete
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_failed_writer_refuses_more_rows(tmp_path, monkeypatch):
    rows = make_rows()
    writer = CacheWriter(tmp_path / "cache", make_metadata(), PER_SHARD)

    def fail(*args):
        raise OSError(errno.EIO, "broken disk")

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "write_atomically", fail)
        with pytest.raises(OSError, match="broken disk"):
            writer.append(rows, range(N_ROWS))
    # Rows appended twice would silently be two rows.
    with pytest.raises(RuntimeError, match="create a new one"):
        writer.append(rows, range(N_ROWS))


def test_append_rejects_rows_that_do_not_fit(tmp_path):
    rows = make_rows(3)
    bad = dataclasses.replace(
        rows,
        activations_ND=np.array([[np.inf] + [0] * 5, [np.nan] * 6, [1] * 6], np.float32),
        tokens_NS=np.zeros((3, SEQ_LEN + 1), np.int32),
        positions_N=np.array([0, 0, SEQ_LEN], np.int32),
        lengths_N=np.array([1, 1, SEQ_LEN], np.int32),
    )
    writer = CacheWriter(tmp_path / "cache", make_metadata(), PER_SHARD)
    with pytest.raises(ValueError) as caught:
        writer.append(bad, [0, 1])
    for part in (
        "activations are 6 wide",
        "contexts are 8 long",
        "1 rows have a position outside",
        "2 rows have activations that are not finite",
        "2 cursors for 3 rows",
    ):
        assert part in str(caught.value)
    assert writer.rows_appended == 0
    with pytest.raises(CacheError, match="no rows"):
        writer.finish()


def test_overflow_of_bfloat16_is_an_error(tmp_path):
    rows = make_rows(3)
    largest = np.full_like(rows.activations_ND, np.finfo(np.float32).max)
    writer = CacheWriter(tmp_path / "cache", make_metadata(dtype="bfloat16"), PER_SHARD)
    with pytest.raises(ValueError, match="3 rows have activations that are not finite"):
        writer.append(dataclasses.replace(rows, activations_ND=largest), range(3))


def test_rows_validates_shapes_and_dtypes():
    rows = make_rows(4)
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(
            rows,
            activations_ND=np.zeros((4, D_MODEL), np.float16),
            tokens_NS=rows.tokens_NS[:3],
            documents_N=rows.documents_N.astype(np.int32),
        )
    for name in ("activations_ND", "tokens_NS", "documents_N"):
        assert f"Rows.{name}" in str(caught.value)
    both = Rows.concatenate([rows.take([3, 1]), rows.take(slice(0, 1))])
    assert np.array_equal(both.documents_N, rows.documents_N[[3, 1, 0]])


@pytest.mark.parametrize("indices", [[N_ROWS], [-1], [0.5], [[0, 1]]])
def test_rows_rejects_bad_indices(tmp_path, indices):
    dump(tmp_path / "cache", make_rows(), make_metadata())
    with pytest.raises(ValueError, match="row indices"):
        ActivationCache.open(tmp_path / "cache").rows(indices)
