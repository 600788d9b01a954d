"""Earlier public cache layouts give the same rows as ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conlens_jax.data.cache_metadata import CacheError
from conlens_jax.data.legacy import LegacyCache, open_cache

D_MODEL, PAD = 4, 50


def make_sample(torch, number: int, prime: bool = True, dtype=None) -> dict:
    """Sample ``number``: its activation and tokens can be told from all others'."""

    def half(value: int, suffix: str) -> dict:
        return {
            f"A{suffix}": torch.arange(D_MODEL).add(10 * value).to(dtype or torch.float16),
            f"input_ids_A{suffix}": torch.tensor([value, value + 1, value + 2, PAD, PAD]),
            f"token_pos_A{suffix}": 1 + value % 2,
        }

    sample = {**half(2 * number, ""), "layer_idx": 6}
    return {**sample, **half(2 * number + 1, "_prime")} if prime else sample


def assert_rows(rows, values: list[int], seq_len: int = 5, length: int = 3) -> None:
    """The rows are those that ``make_sample`` made of ``values``."""
    expected = np.array([[10 * value + d for d in range(D_MODEL)] for value in values], np.float32)
    assert rows.activations_ND.dtype == np.float32
    assert rows.activations_ND.tolist() == expected.tolist()
    tail = [PAD] * (seq_len - 3)
    assert rows.tokens_NS.tolist() == [[v, v + 1, v + 2, *tail] for v in values]
    assert rows.positions_N.tolist() == [1 + value % 2 for value in values]
    assert rows.lengths_N.tolist() == [length] * len(values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_file_a_sample(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    for number in range(4):
        sample = make_sample(torch, number, prime=number != 1, dtype=getattr(torch, dtype))
        torch.save(sample, tmp_path / f"sample_{number:03d}.pt")
    cache = open_cache(tmp_path)
    assert isinstance(cache, LegacyCache)
    values = [0, 1, 2, 4, 5, 6, 7]  # sample 1 has no prime half
    assert len(cache) == len(values)
    assert_rows(cache.rows(range(7)), values, length=5)
    order = [5, 0, 3, 3]
    assert_rows(cache.rows(order), [values[i] for i in order], length=5)
    # The dump stored hidden_states[layer_idx], the output of the block before.
    assert (cache.metadata.layer, cache.metadata.d_model, cache.metadata.seq_len) == (5, D_MODEL, 5)
    with pytest.raises(ValueError, match="row indices"):
        cache.rows([7])


def write_shards(torch, folder: Path, with_metadata: bool = True) -> None:
    (folder / "rank_0").mkdir(parents=True)
    (folder / "rank_1").mkdir()
    samples = [make_sample(torch, number) for number in range(5)]
    torch.save(samples[:3], folder / "rank_0" / "shard_00000000.pt")
    torch.save(samples[3:], folder / "rank_1" / "shard_00010000.pt")
    if with_metadata:
        names = ["shard_00000000.pt", "shard_00010000.pt"]
        config = {"model_name": "gpt2", "layer_idx": 6, "split_name": "train", "seed": 42}
        content = {"shards": [{"name": name} for name in names], "config": config}
        (folder / "metadata.json").write_text(json.dumps(content))


@pytest.mark.parametrize("with_metadata", [True, False])
def test_shards_of_lists(tmp_path, with_metadata):
    torch = pytest.importorskip("torch")
    write_shards(torch, tmp_path / "old", with_metadata)
    cache = open_cache(tmp_path / "old", pad_id=PAD)
    assert len(cache) == 10
    # With the padding token known, the padding is no text, and no room is kept for it.
    assert_rows(cache.rows([9, 0, 6, 5]), [9, 0, 6, 5], seq_len=3)
    assert cache.metadata.model_id == ("gpt2" if with_metadata else "")
    assert cache.metadata.layer == 5
    cache.check(model_id="gpt2", weights_hash="anything", layer=5, d_model=D_MODEL)
    with pytest.raises(CacheError, match="model.layer: the cache has 5, this run has 6"):
        cache.check(layer=6)


def test_padding_token_at_the_position_is_text(tmp_path):
    torch = pytest.importorskip("torch")
    sample = make_sample(torch, 0, prime=False)
    sample |= {"input_ids_A": torch.tensor([1, PAD, PAD, PAD, PAD]), "token_pos_A": 2}
    torch.save(sample, tmp_path / "a.pt")
    rows = LegacyCache.open(tmp_path, pad_id=PAD).rows([0])
    assert (rows.positions_N[0], rows.lengths_N[0]) == (2, 3)


def test_same_context_is_the_same_document(tmp_path):
    torch = pytest.importorskip("torch")
    first, second = make_sample(torch, 0), make_sample(torch, 1)
    second["input_ids_A"] = first["input_ids_A_prime"].clone()
    torch.save([first, second], tmp_path / "a.pt")
    documents = LegacyCache.open(tmp_path).rows(range(4)).documents_N
    assert documents[1] == documents[2]
    assert len(set(documents.tolist())) == 3
    assert (documents >= 0).all()


def test_bad_files_are_reported_together(tmp_path):
    torch = pytest.importorskip("torch")
    for number, drop in enumerate(["token_pos_A", "input_ids_A_prime"]):
        sample = make_sample(torch, number)
        del sample[drop]
        torch.save(sample, tmp_path / f"{number}.pt")
    overflown = make_sample(torch, 2)
    overflown["A"] = overflown["A"] * 1e4
    torch.save(overflown, tmp_path / "2.pt")
    (tmp_path / "3.pt").write_bytes(b"not torch")
    outside = make_sample(torch, 4) | {"token_pos_A": 5}
    torch.save(outside, tmp_path / "4.pt")
    torch.save(make_sample(torch, 5), tmp_path / "5.pt")
    with pytest.raises(CacheError) as caught:
        LegacyCache.open(tmp_path)
    message = str(caught.value)
    assert "0.pt: sample 0 lacks token_pos_A\n" in message
    assert "1.pt: sample 0 lacks input_ids_A_prime\n" in message
    assert "2.pt: 1 activations are not finite" in message
    assert "3.pt: torch.load(weights_only=True) failed" in message
    assert "4.pt: sample 0: token_pos_A=5 outside its 5 tokens" in message
    assert "5.pt" not in message


def test_pickled_code_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"A": Attack()}, tmp_path / "a.pt")
    with pytest.raises(CacheError, match=r"a\.pt"):
        LegacyCache.open(tmp_path)
    assert not marker.exists()


def test_different_widths_and_missing_shards(tmp_path):
    torch = pytest.importorskip("torch")
    write_shards(torch, tmp_path / "old")
    wide = make_sample(torch, 0, prime=False) | {"A": torch.zeros(D_MODEL + 1)}
    torch.save([wide], tmp_path / "old" / "shard_wide.pt")
    with pytest.raises(CacheError, match="4 in shard_00000000.pt, 5 in shard_wide.pt"):
        LegacyCache.open(tmp_path / "old")
    (tmp_path / "old" / "rank_1" / "shard_00010000.pt").unlink()
    with pytest.raises(CacheError, match="shard_00010000.pt: named in metadata.json but missing"):
        LegacyCache.open(tmp_path / "old")


def test_open_cache_of_nothing(tmp_path):
    with pytest.raises(CacheError, match="no activation cache"):
        open_cache(tmp_path)
    with pytest.raises(CacheError, match="no .pt or .parquet file"):
        LegacyCache.open(tmp_path)


# --- parquet ------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict, fixed: bool = True, **extraction) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    values = [[10.0 * i + d for d in range(D_MODEL)] for i in range(5)]
    kind = pa.list_(pa.float32(), D_MODEL) if fixed else pa.list_(pa.float32())
    table = pa.table({"activation_vector": pa.array(values, type=kind), **columns})
    pq.write_table(table, path, row_group_size=2)
    if extraction:
        sidecar = {"kind": "nla_dataset", "schema_version": 1, "extraction": extraction}
        Path(f"{path}.nla_meta.yaml").write_text(yaml.safe_dump(sidecar))


PREFIXES = [[1], [1, 2], [3, 4, 5], [6, 7], [8]]


@pytest.mark.parametrize("fixed", [True, False])
def test_parquet_with_token_prefixes(tmp_path, fixed):
    columns = {"token_ids_prefix": PREFIXES, "doc_id": ["a", "a", "b", "c", "c"]}
    write_parquet(
        tmp_path / "av.parquet",
        columns,
        fixed,
        base_model="some/model",
        d_model=D_MODEL,
        layer_index=20,
        norm="none",
    )
    cache = open_cache(tmp_path)
    assert (cache.metadata.model_id, cache.metadata.layer) == ("some/model", 20)
    rows = cache.rows([4, 2, 0])
    assert rows.activations_ND[:, 1].tolist() == [41.0, 21.0, 1.0]
    assert rows.tokens_NS.tolist() == [[8, 0, 0], [3, 4, 5], [1, 0, 0]]
    assert rows.lengths_N.tolist() == [1, 3, 1]
    assert rows.positions_N.tolist() == [0, 2, 0]
    documents = cache.rows(range(5)).documents_N.tolist()
    assert documents[0] == documents[1] and documents[3] == documents[4]
    assert len(set(documents)) == 3
    assert len(open_cache(tmp_path / "av.parquet")) == 5


def test_parquet_with_whole_contexts_and_positions(tmp_path):
    columns = {
        "input_ids": [[1, 2, 3]] * 5,
        "token_position": [0, 1, 2, 1, 0],
        "doc_id": [7, 8, 9, 10, 11],
        "activation_layer": [12] * 5,
    }
    write_parquet(tmp_path / "a.parquet", columns)
    cache = open_cache(tmp_path)
    rows = cache.rows(range(5))
    assert rows.positions_N.tolist() == [0, 1, 2, 1, 0]
    assert rows.lengths_N.tolist() == [3] * 5
    assert rows.documents_N.tolist() == [7, 8, 9, 10, 11]
    assert cache.metadata.layer == 12


def test_parquet_problems(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"token_ids_prefix": PREFIXES}, norm="unit")
    with pytest.raises(CacheError, match="raw activations"):
        open_cache(tmp_path)
    write_parquet(tmp_path / "a.parquet", {"token_ids_prefix": PREFIXES}, d_model=8)
    with pytest.raises(CacheError, match=r"8 in the sidecar, 4 in a\.parquet"):
        open_cache(tmp_path)
    columns = {"token_ids": [[1]] * 5, "position": [0, 0, 0, 1, 0]}
    write_parquet(tmp_path / "a.parquet", columns, norm="none")
    with pytest.raises(CacheError, match="row 1: position 1 outside its 1 tokens"):
        open_cache(tmp_path)

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"vector": [[1.0]]}), tmp_path / "b.parquet")
    ragged = pa.table({"activation_vector": [[1.0], [1.0, 2.0]]})
    pq.write_table(ragged, tmp_path / "c.parquet")
    with pytest.raises(CacheError) as caught:
        open_cache(tmp_path)
    assert "b.parquet: no column activation_vector" in str(caught.value)
    assert "c.parquet: activation_vector has lengths ['1', '2']" in str(caught.value)


def test_parquet_without_tokens_is_read_but_not_trained_on(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"doc_id": ["a"] * 5})
    cache = open_cache(tmp_path / "a.parquet")
    assert cache.rows([3]).activations_ND[0, 0] == 30.0
    assert cache.rows([3]).lengths_N.tolist() == [0]
    with pytest.raises(CacheError, match="no token columns"):
        cache.check(layer=cache.metadata.layer)
