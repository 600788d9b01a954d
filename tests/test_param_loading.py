"""Parameters read onto a mesh: every layout, in slices and in chunks, within little host memory."""

from __future__ import annotations

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import save_file
from test_param_table import CASES, CONFIG

from conlens_jax.config import MeshConfig
from conlens_jax.models.mxfp4 import dequantise_mxfp4
from conlens_jax.models.param_loading import ParamReader
from conlens_jax.models.param_table import ParamRow
from conlens_jax.models.sharding import param_shardings
from conlens_jax.models.tensor_files import TensorFiles
from conlens_jax.parallel.mesh import make_mesh, param_spec

MIXTRAL = "h.{layer}.experts.{expert}.w"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=2, tensor=2))


def case_rows():
    for name, (dims, layout, piece, _, _) in CASES.items():
        yield name, ParamRow(("w",), "N" + dims, "h.{layer}." + name, layout, piece=piece)
    yield "mixtral up", ParamRow(("w",), "NEDF", MIXTRAL)


ROWS = dict(case_rows())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tensor for each of the rows."""
    folder, rng = tmp_path_factory.mktemp("tensors"), np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(row.hf_shape(CONFIG)).astype("bfloat16")
        for row in ROWS.values()
        for _, name in row.tensor_names(CONFIG)
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def plainly(tensors, row, config=CONFIG):
    whole = np.empty(row.shape(config), config.dtype)
    for index, name in row.tensor_names(config):
        whole[index] = row.view(tensors.array(name), config)
    return whole


@pytest.mark.parametrize("chunk_bytes", [1 << 28, 4 * 32 * 40 * 2, 1], ids=["one", "some", "least"])
@pytest.mark.parametrize("case", ROWS)
def test_every_layout_in_slices_and_chunks(folder, mesh, case, chunk_bytes):
    row, tensors = ROWS[case], TensorFiles(folder)
    sharding = NamedSharding(mesh, param_spec(row.dims))
    seen = []
    reader = ParamReader(tensors, CONFIG, on_bytes=seen.append, chunk_bytes=chunk_bytes)
    loaded = reader.load(row, sharding)
    reader.close()
    np.testing.assert_array_equal(loaded, plainly(tensors, row))
    assert loaded.sharding.is_equivalent_to(sharding, loaded.ndim)
    assert sum(seen) == loaded.nbytes
    assert max(seen) <= max(chunk_bytes, loaded.nbytes // CONFIG.n_layers)


def test_each_device_reads_its_slices_and_replicas_share_them(folder, mesh, monkeypatch):
    row = ROWS["linear"]
    (sharding,) = jax.tree.leaves(param_shardings([row], CONFIG, mesh))
    reader = ParamReader(TensorFiles(folder), CONFIG)
    read, plain = [], reader.slice
    monkeypatch.setattr(reader, "slice", lambda *given: read.append(plain(*given)) or read[-1])
    loaded = reader.load(row, sharding)
    reader.close()
    # 8 devices, of which "data" holds 2 of each of the 2 × 2 parts.
    assert [part.shape for part in read] == [loaded.addressable_shards[0].data.shape] * 4
    assert sum(part.size for part in read) == loaded.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16"])
def test_conversion_of_stored_numbers(tmp_path, stored, dtype):
    row = ParamRow(("w",), "DF", "w")
    config = dataclasses.replace(CONFIG, dtype=dtype)
    tensor = np.random.default_rng(0).standard_normal(row.hf_shape(config)).astype(stored)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    reader = ParamReader(TensorFiles(tmp_path), config)
    read = reader.slice(row, (slice(None), slice(5, 30)))
    reader.close()
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, tensor[5:30].T.astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_beyond_the_range(tmp_path, dtype):
    row, config = ParamRow(("w",), "DF", "w"), dataclasses.replace(CONFIG, dtype=dtype)
    tensor = np.ones(row.hf_shape(config))
    tensor[2, 3] = 1e39
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    reader = ParamReader(TensorFiles(tmp_path), config)
    assert (reader.slice(row, (slice(None), slice(3, None))) == 1).all()
    with pytest.raises(ValueError, match=f"w has numbers in float64 that {dtype} cannot hold"):
        reader.slice(row, (slice(None), slice(None)))
    reader.close()


def test_host_memory_beside_the_devices(tmp_path):
    """NumPy's memory is counted here, that of the devices is not."""
    config = dataclasses.replace(CONFIG, n_layers=16, d_model=256, d_mlp=512)
    row = ParamRow(("w",), "NDF", "{layer}.w")
    layer = np.ones((512, 256), np.float32)
    save_file({f"{n}.w": layer for n in range(16)}, tmp_path / "model.safetensors")
    (sharding,) = jax.tree.leaves(param_shardings([row], config, make_mesh(MeshConfig(fsdp=8))))
    reader = ParamReader(TensorFiles(tmp_path), config, chunk_bytes=layer.nbytes)
    tracemalloc.start()
    try:
        loaded = reader.load(row, sharding)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        reader.close()
    assert loaded.nbytes == 16 * layer.nbytes
    assert peak < 2.5 * layer.nbytes


# --- mxfp4 ----------------------------------------------------------------------------------------


def random_mxfp4(shape, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
    return blocks, rng.integers(90, 160, shape, dtype=np.uint8)


def test_mxfp4_is_dequantised_as_transformers_does():
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_mxfp4((3, 10, 2))
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    found = dequantise_mxfp4(blocks, scales)
    np.testing.assert_array_equal(found.astype(np.float32), expected.float().numpy())


@pytest.mark.parametrize("chunk_bytes", [1 << 28, 4 * 32 * 40 * 2])
def test_mxfp4_tensors_in_a_folder(tmp_path, mesh, chunk_bytes):
    row = dataclasses.replace(ROWS["gpt-oss gate"], hf_name="h.{layer}.gate_up_proj")
    experts, d_model, outputs = row.hf_shape(CONFIG)
    tensors, expected = {}, []
    for layer in range(CONFIG.n_layers):
        blocks, scales = random_mxfp4((experts, outputs, d_model // 32), seed=layer)
        name = f"h.{layer}.gate_up_proj"
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
        expected.append(dequantise_mxfp4(blocks, scales)[..., ::2])
    save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    files.take_names_of(None, [name for _, name in row.tensor_names(CONFIG)])
    assert set(files) == {"h.0.gate_up_proj", "h.1.gate_up_proj"}
    assert files["h.0.gate_up_proj"].shape == (experts, d_model, outputs)
    (sharding,) = jax.tree.leaves(param_shardings([row], CONFIG, mesh))
    reader = ParamReader(files, CONFIG, chunk_bytes=chunk_bytes)
    loaded = reader.load(row, sharding)
    reader.close()
    np.testing.assert_array_equal(loaded, np.stack(expected).astype(np.float32))


# --- names ----------------------------------------------------------------------------------------


class Family:
    IGNORED = (r"vision_tower\..*",)
    RENAMES = ((r"^language_model\.", ""),)


def test_names_of_files_are_brought_to_those_of_the_table(tmp_path):
    names = ["wte.weight", "lm_head.weight", "language_model.transformer.wpe.weight"]
    dropped = [
        "vision_tower.patch",
        "h.0.attn.bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ]
    tensors = {name: np.full(2, n, np.float32) for n, name in enumerate([*names, *dropped])}
    save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    expected = ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"]
    files.take_names_of(Family, expected, "transformer.")
    assert set(files) == set(expected)
    assert files.array("transformer.wpe.weight")[0] == 2
