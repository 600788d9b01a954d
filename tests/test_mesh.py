"""The device mesh, and parameters that are really split over it."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import random_tokens, tiny_config, write_tiny_folder

import conlens_jax
from conlens_jax.config import ConfigError, MeshConfig, from_config_dict
from conlens_jax.models.families.llama import param_table
from conlens_jax.models.sharding import param_shardings
from conlens_jax.parallel.constrain import constrain
from conlens_jax.parallel.mesh import (
    AXES,
    abstract_mesh,
    activation_axes,
    batch_sharding,
    check_batch,
    make_mesh,
    param_spec,
    planned_mesh,
    replicated,
    shardings_like,
    single_device_mesh,
)

SHARDED = MeshConfig(fsdp=2, tensor=2)
CHANGES = {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_folder(folder, **CHANGES)
    return folder


@pytest.fixture(scope="module")
def sharded(folder):
    return conlens_jax.load_model(folder, mesh=make_mesh(SHARDED), unroll=1)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (None, (8, 1, 1)),
        (SHARDED, (2, 2, 2)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1)),
        (MeshConfig(tensor=8), (1, 1, 8)),
    ],
    ids=str,
)
def test_axes_are_always_there(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == shape


def test_the_mesh_of_one_device():
    assert dict(single_device_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "config",
    [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(data=4, tensor=4), MeshConfig(tensor=16)],
    ids=str,
)
def test_axes_that_do_not_multiply_to_the_devices(config):
    with pytest.raises(ConfigError) as error:
        make_mesh(config)
    message = str(error.value)
    assert f"× {config.fsdp} × {config.tensor} must be the number of devices, 8" in message
    assert "mesh.data × mesh.fsdp × mesh.tensor" in message


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig("single"), (1, 1, 1)),
        (MeshConfig("data8"), (8, 1, 1)),
        (MeshConfig("fsdp8"), (1, 8, 1)),
        (MeshConfig("fsdp2_tensor4"), (1, 2, 4)),
        (MeshConfig("multislice", slices=2), (2, 4, 1)),
        (MeshConfig("multislice", slices=2, tensor=2), (2, 2, 2)),
        (MeshConfig("multislice"), (1, 8, 1)),
    ],
    ids=str,
)
def test_presets(config, shape):
    assert tuple(make_mesh(config).shape.values()) == shape


def test_presets_that_do_not_fit():
    with pytest.raises(ConfigError, match="must be the number of devices, 4"):
        make_mesh(MeshConfig("fsdp8"), jax.devices()[:4])
    with pytest.raises(ConfigError, match="mesh.tensor = 3 × 1 does not divide the 8 devices"):
        make_mesh(MeshConfig("multislice", slices=3))
    with pytest.raises(ConfigError, match="leave them at 0 and 1, or"):
        from_config_dict({"mesh": {"preset": "multislice", "fsdp": 4}})
    clash = {"mesh": {"preset": "fsdp8", "fsdp": 4}}
    with pytest.raises(ConfigError, match="leave them at 0, 1 and 1, or leave the preset empty"):
        from_config_dict(clash)
    with pytest.raises(ConfigError, match="mesh.slices is for mesh.preset='multislice'"):
        from_config_dict({"mesh": {"slices": 2}})
    with pytest.raises(ConfigError, match="mesh.preset must be one of"):
        from_config_dict({"mesh": {"preset": "fsdp9"}})


def test_devices_of_a_plan():
    assert planned_mesh(MeshConfig("fsdp8")) == (MeshConfig("fsdp8"), 8)
    assert planned_mesh(MeshConfig(fsdp=4, tensor=2))[1] == 8
    planned, devices = planned_mesh(MeshConfig("multislice"))
    assert (planned.slices, devices) == (2, 16)
    assert dict(abstract_mesh(planned, devices).shape) == {"data": 2, "fsdp": 8, "tensor": 1}


def test_an_axis_that_splits_nothing():
    config = tiny_config()
    norms = [row for row in param_table(config) if row.dims in ("D", "ND")]
    with pytest.raises(ConfigError, match="mesh.tensor=2 splits nothing: .* set mesh.tensor=1"):
        param_shardings(norms, config, make_mesh(SHARDED))
    assert param_shardings(norms, config, make_mesh(MeshConfig(fsdp=2)))


def test_two_dimensions_on_one_mesh_axis():
    with pytest.raises(ValueError, match=r"dimensions H and F of \[N, H, F\] .* axis 'tensor'"):
        param_spec("NHF")
    with pytest.raises(ValueError, match=r"dimensions B and D of \[B, D\] .* axis 'fsdp'"):
        param_spec("BD")
    with pytest.raises(ValueError, match=r"dimensions K and V of \[B, K, V\] .* axis 'tensor'"):
        constrain(np.zeros((2, 2, 2)), "BKV")


def test_activations_are_sharded_by_the_letters_of_their_dimensions():
    assert activation_axes("BSD") == [("data", "fsdp"), None, None]
    assert activation_axes("DD") == [None, None]
    mesh = make_mesh(SHARDED)
    x = np.arange(4 * 3 * 6, dtype=np.float32).reshape(4, 3, 6)
    assert constrain(x, "BSV") is x
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: constrain(x, "BSV"))(x)
        odd = jax.jit(lambda x: constrain(x, "BSV"))(x[:1, :, :5])
    assert split.sharding.spec == P(("data", "fsdp"), None, "tensor")
    assert {shard.data.shape for shard in split.addressable_shards} == {(1, 3, 3)}
    assert odd.sharding.is_fully_replicated
    np.testing.assert_array_equal(split, x)


def test_dimensions_that_do_not_divide_are_all_named():
    config = tiny_config(num_key_value_heads=1, hidden_size=28, vocab_size=45, head_dim=8)
    with pytest.raises(ConfigError) as error:
        param_shardings(param_table(config), config, make_mesh(MeshConfig(fsdp=8)))
    assert "mesh.fsdp=8 does not divide dimension D=28 of layers.query" in str(error.value)
    with pytest.raises(ConfigError) as error:
        param_shardings(param_table(config), config, make_mesh(SHARDED))
    message = str(error.value)
    for part in ("K=1 of layers.key", "K=1 of layers.value", "V=45 of embedding"):
        assert f"mesh.tensor=2 does not divide dimension {part}" in message
    assert "D=28" not in message and "layers.query" not in message


def test_batch_that_does_not_divide():
    mesh = make_mesh(SHARDED)
    check_batch("joint.batch_size", 12, mesh)
    with pytest.raises(ConfigError, match=r"joint\.batch_size=6 .* mesh\.fsdp = 4"):
        check_batch("joint.batch_size", 6, mesh)


def test_batches_are_split_over_data_and_fsdp():
    batch = jax.device_put(np.arange(16.0).reshape(8, 2), batch_sharding(make_mesh(SHARDED)))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 2)}
    assert len({shard.index[0].start for shard in batch.addressable_shards}) == 4


def test_parameters_are_really_split(sharded):
    """Every array, shape on one device against the shape by hand: D over fsdp, V H K F over
    tensor, and each device holds about a quarter of the model."""
    expected = {
        "embedding": (24, 16),
        "final_norm": (16,),
        "output_head": (16, 24),
        "attention_norm": (2, 16),
        "mlp_norm": (2, 16),
        "query": (2, 16, 2, 8),
        "key": (2, 16, 1, 8),
        "value": (2, 16, 1, 8),
        "attention_out": (2, 2, 8, 16),
        "gate": (2, 16, 20),
        "up": (2, 16, 20),
        "down": (2, 20, 16),
        "query_bias": (2, 2, 8),
        "key_bias": (2, 1, 8),
        "value_bias": (2, 1, 8),
        "attention_out_bias": (2, 16),
        "gate_bias": (2, 20),
        "up_bias": (2, 20),
        "down_bias": (2, 16),
    }
    leaves = {path[-1].key: leaf for path, leaf in jax.tree.leaves_with_path(sharded.params)}
    shapes = {
        name: {s.data.shape for s in leaf.addressable_shards} for name, leaf in leaves.items()
    }
    assert shapes == {name: {shape} for name, shape in expected.items()}
    assert all(len(leaf.sharding.device_set) == 8 for leaf in leaves.values())


def test_logits_do_not_depend_on_the_mesh(sharded, folder, capfd):
    alone = conlens_jax.load_model(folder, unroll=1)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(alone.params))
    tokens = random_tokens(4, 9)
    split = jax.device_put(tokens, batch_sharding(make_mesh(SHARDED)))
    np.testing.assert_allclose(sharded.logits(split), alone.logits(tokens), rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        sharded.capture(tokens, 1, [1, 2, 3, 8]),
        alone.capture(tokens, 1, [1, 2, 3, 8]),
        rtol=0,
        atol=1e-5,
    )
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_clones_and_moments_are_split_like_the_model(sharded):
    mesh = make_mesh(SHARDED)
    config = sharded.config
    model = param_shardings(param_table(config), config, mesh)
    layers = {"query": sharded.params["layers"]["query"]}
    tree = {
        "decoder": {"base": {"layers": layers, "embedding": sharded.params["embedding"]}},
        "moments": ({"layers": layers},),
        "projection": np.zeros((32, 32), np.float32),
        "layers": {"query": np.zeros(())},
        "step": np.zeros((), np.int32),
    }
    chosen = shardings_like(tree, model, mesh)
    assert chosen["decoder"]["base"]["layers"]["query"] == model["layers"]["query"]
    assert chosen["decoder"]["base"]["embedding"].spec == P("tensor", "fsdp")
    assert chosen["moments"][0]["layers"]["query"].spec == P(None, "fsdp", "tensor", None)
    for other in (chosen["projection"], chosen["layers"]["query"], chosen["step"]):
        assert other == replicated(mesh)
