"""Plans are what a run then has: bytes, parameters, programs; and the command that prints them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import assert_refused, run
from tiny_models import TINY, write_tiny_folder

import conlens_jax
from conlens_jax.config import (
    ConfigError,
    ExperimentConfig,
    MeshConfig,
    with_changes,
)
from conlens_jax.data.device_batches import make_batch
from conlens_jax.data.rows import Rows
from conlens_jax.lens.spec import init_lens
from conlens_jax.models.families.llama import param_table
from conlens_jax.models.param_table import count_params
from conlens_jax.parallel.footprint import count, device_bytes, in_units, total_bytes
from conlens_jax.parallel.mesh import abstract_mesh, batch_sharding, make_mesh
from conlens_jax.planning.compiled import compile_step
from conlens_jax.planning.lens import make_plan
from conlens_jax.planning.memory import peak, step_memory
from conlens_jax.planning.model_source import planned_model
from conlens_jax.planning.report import flops_table, meshes_table, model_table
from conlens_jax.training.run import placed
from conlens_jax.training.state import init_state, stage_optimizer, stages_of

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
SETTINGS = {
    "model.layer": 1,
    "model.unroll": 1,
    "lens.decoder_prompt": "word5 <embed> word6",
    "dump.seq_len": 24,
    "dump.n_samples": 64,
    "warm.batch_size": 8,
    "joint.batch_size": 8,
    "joint.rows_per_document": 2,
    "dump.positions_per_sequence": 2,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
}


def config_of(folder, **changes) -> ExperimentConfig:
    return with_changes(ExperimentConfig(), {"model.path": str(folder), **SETTINGS, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_folder(folder)
    return folder


def plan_of(folder, mesh=None, **changes):
    config = config_of(folder, **changes)
    return make_plan(config, planned_model(config), mesh or abstract_mesh(MESH, 8))


def held(tree, device) -> int:
    """Bytes that one device really has of a tree of arrays."""
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def layout(tree) -> list:
    """Path, shape, dtype and split of every leaf."""
    return [
        (jax.tree_util.keystr(path), leaf.shape, leaf.dtype, leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.mark.parametrize(
    ("dtype", "train", "quantise"),
    [
        ("float32", "full", ""),
        ("bfloat16", "full", ""),
        ("bfloat16", "lora", ""),
        ("float32", "lora", "int8"),
    ],
)
def test_a_run_has_what_was_planned(folder, dtype, train, quantise):
    changes = {"model.dtype": dtype, "model.quantise": quantise, "lens.input_patches": 1}
    for side in ("decoder", "encoder"):
        changes[f"lens.train_{side}"] = train
    plan = plan_of(folder, **changes)
    mesh = make_mesh(MESH)
    model = conlens_jax.load_model(folder, dtype=dtype, mesh=mesh, quantise=quantise)
    session = SimpleNamespace(model=model, mesh=mesh)
    trainable, frozen = init_lens(model.params, plan.spec, np.ones(32), 1.0)
    trainable = placed(trainable, session)
    (_, joint), device = stages_of(plan.config), mesh.devices.flat[3]
    optimizer = stage_optimizer(joint, trainable, 64)
    state = placed(init_state(trainable, optimizer), session)
    assert layout(plan.state(joint)) == layout(state)
    assert layout(plan.frozen["original"]) == layout(frozen["original"])
    assert jax.tree.map(jnp.shape, plan.frozen) == jax.tree.map(jnp.shape, frozen)
    for planned, real in (
        (plan.state(joint), state),
        (plan.trainable, trainable),
        (plan.frozen["original"], frozen["original"]),
    ):
        assert device_bytes(planned) == held(real, device)
        assert total_bytes(planned) == sum(leaf.nbytes for leaf in jax.tree.leaves(real))
        assert count(planned) == count(real)
    assert count(frozen["original"]) == count_params(param_table(plan.spec.model), plan.spec.model)
    assert device_bytes(plan.frozen["original"]) < total_bytes(plan.frozen["original"]) / 2
    stored = {part.name: part.n_bytes for part in step_memory(plan, joint)}
    assert stored["optimizer state"] == held(state.opt_state, device)
    assert stored["trained weights"] == held(trainable, device)


def test_a_batch_has_the_planned_shape(folder):
    plan = plan_of(folder)
    rows = Rows(
        np.zeros((8, 32), np.float32),
        np.zeros((8, 24), np.int32),
        np.full(8, 9, np.int32),
        np.full(8, 24, np.int32),
        np.repeat(np.arange(4), 2),
    )
    joint = stages_of(plan.config)[1]
    real = make_batch(rows, batch_sharding(make_mesh(MESH)), 8, rows_per_document=2)
    assert layout(plan.batch(joint)) == layout(real)
    streamed = plan_of(folder, **{"data.source": "stream"}).batch(joint)
    assert streamed.activation_BD.shape == (8, 0)


@pytest.mark.parametrize("stage", [0, 1], ids=["warm", "joint"])
def test_the_real_step_compiles_from_shapes(folder, stage):
    plan = plan_of(folder, mesh=make_mesh(MESH))
    stage = stages_of(plan.config)[stage]
    found = compile_step(plan, stage)
    state, batch = plan.state(stage), plan.batch(stage)
    # The new state takes the place of the old one (a flag of one byte aside), and what a step
    # looks at is an argument.
    assert 0 <= device_bytes(state) - found.aliased <= 1
    inputs = device_bytes(state) + device_bytes(batch)
    assert inputs / 2 < found.arguments <= inputs + device_bytes(plan.frozen_in(stage))
    assert found.peak == found.arguments + found.temporary + found.outputs - found.aliased
    # Shapes alone: the estimate need not be better than this.
    assert 1 / 4 < peak(step_memory(plan, stage)) / found.peak < 4


def test_more_devices_and_less_kept_take_less(folder):
    def total(mesh=MESH, **changes):
        plan = plan_of(
            folder, mesh=abstract_mesh(mesh, mesh.data * mesh.fsdp * mesh.tensor), **changes
        )
        return {part.name: part.n_bytes for part in step_memory(plan, stages_of(plan.config)[1])}

    here, alone = total(), total(MeshConfig(data=1))
    for name in ("original model", "optimizer state", "activations", "decode cache", "logits"):
        assert 0 < here[name] < alone[name], name
    kept = [total(**{"model.remat": kind})["activations"] for kind in ("none", "products", "full")]
    assert kept[0] > kept[1] > kept[2] > 0
    assert total(**{"loss.text.start": 1.0})["activations"] > here["activations"]
    assert total(**{"loss.kl.start": 0.0})["context"] == 0 < here["context"]
    doubled = total(**{"joint.optimizer.accumulate": 2})
    assert doubled["activations"] == here["activations"] / 2


def test_decode_cache_is_that_of_the_text(folder):
    """One token takes a key and a value in each of 3 layers, of 2 heads of 8 numbers."""
    plan = plan_of(folder)
    parts = {part.name: part.n_bytes for part in step_memory(plan, stages_of(plan.config)[1])}
    slots = len("<bos> word5 <embed> word6".split()) + plan.spec.text_len - 1
    assert parts["decode cache"] == (8 / 4) * slots * 3 * 2 * 2 * 8 * 4 / 2


def test_tables(folder):
    plan = plan_of(folder)
    _, rows = model_table(plan)
    assert rows[-1][1] == f"{count(plan.frozen['original']):,}"
    warm, joint = stages_of(plan.config)
    for stage in (warm, joint):
        _, rows = flops_table(plan, stage)
        values = [float(row[1]) for row in rows]
        assert values[-1] == pytest.approx(sum(values[:-1]), rel=1e-3) and min(values) > 0
    streamed = plan_of(folder, **{"data.source": "stream"})
    assert flops_table(streamed, warm)[1][0][0] == "capture"
    by_mesh = {row[0]: row[2] for row in meshes_table(plan)[1]}
    assert by_mesh["fsdp2_tensor4"].startswith("cannot: mesh.tensor=4 does not divide")
    assert by_mesh["single"] != by_mesh["fsdp8"]


def test_bytes_as_people_read_them():
    values = (0, 1023, 1024, 1536 * 1024, 3 << 30, 5 << 40)
    read = ["0 B", "1023 B", "1.00 KiB", "1.50 MiB", "3.00 GiB", "5.00 TiB"]
    assert [in_units(value) for value in values] == read


# --- where a shape comes from -------------------------------------------------------------------


def test_a_shape_is_found_by_hub_id_file_and_folder(tmp_path, folder):
    config = config_of("meta-llama/Llama-3.1-8B", **{"model.dtype": "bfloat16"})
    shipped = planned_model(config)
    assert shipped.shape.d_model == 4096 and shipped.shape.dtype == "bfloat16"
    assert shipped.shape.unroll == 1
    file = tmp_path / "alone.json"
    file.write_text(json.dumps(TINY), encoding="utf-8")
    for path in (file, folder, folder / "config.json"):
        assert planned_model(config, str(path)).shape.d_model == 32
    # A folder's own tokenizer counts the prompt; without one, words do.
    assert planned_model(config, str(folder)).tokenizer.encode("word5 word7") == [5, 7]
    assert len(planned_model(config, str(file)).tokenizer.encode("Short text of:")) == 4


def test_a_shape_that_is_nowhere(tmp_path):
    with pytest.raises(ConfigError, match="--model-config='nowhere'.*nor a folder with"):
        planned_model(ExperimentConfig(), "nowhere")
    with pytest.raises(ConfigError, match="model.path='./nowhere'"):
        planned_model(config_of("./nowhere"))
    with pytest.raises(ConfigError, match="third_party/model_configs.*--model-config"):
        planned_model(config_of("someone/unheard-of"))
    broken = tmp_path / "config.json"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        planned_model(ExperimentConfig(), str(broken))


def test_what_does_not_fit_is_said_before(folder):
    for changes, message in (
        ({"model.layer": 3}, "model.layer=3 is out of range"),
        ({"joint.batch_size": 6}, "joint.batch_size=6 must be a multiple"),
        ({"dump.seq_len": 65}, "dump.seq_len=65 is longer than the 64 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_of(folder, **changes)
    with pytest.raises(ValueError, match="lora_targets has gate, which a gpt2 model does not have"):
        plan_of("openai-community/gpt2", **{"lens.train_decoder": "lora"})
    narrow = dataclasses.replace(MESH, data=1, tensor=4)
    with pytest.raises(ConfigError, match="does not divide dimension K=2"):
        plan_of(folder, mesh=abstract_mesh(narrow, 8))


# --- the command --------------------------------------------------------------------------------


def test_command_prints_the_plan_of_devices_that_are_not_there():
    done = run(
        "plan",
        "--config=configs/windows.py",
        "--config.model.path=meta-llama/Llama-3.3-70B-Instruct",
        "--config.mesh.fsdp=64",
        "--config.mesh.tensor=8",
        "--config.joint.batch_size=64",
        "--config.warm.batch_size=64",
    )
    assert done.returncode == 0, done.stderr
    for said in ("70,553,706,496", "devices=512", "optimizer state", "prefix pass", "fsdp8"):
        assert said in done.stdout, done.stdout


def test_command_compiles(folder):
    settings = {"model.path": folder, **SETTINGS, "joint.steps": 0}
    done = run(
        "plan",
        "--config=configs/windows.py",
        "--compile",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    )
    assert done.returncode == 0, done.stderr
    assert "= peak" in done.stdout and "memory per device, warm" in done.stdout


def test_command_compiles_for_gpus_that_are_not_there(folder):
    settings = {"model.path": folder, **SETTINGS, "joint.steps": 0}
    arguments = [f"--config.{name}={value}" for name, value in settings.items()]
    done = run("plan", "--config=configs/windows.py", "--target=h100", *arguments)
    if importlib.util.find_spec("jax_plugins") is None:
        assert_refused(done, "--target=h100 needs XLA's GPU compiler", "jax-cuda13-pjrt")
    else:
        assert done.returncode == 0 and "= peak" in done.stdout, done.stderr


def test_command_refuses():
    assert_refused(
        run("plan", "--config=configs/quickstart.py", "--target=abacus"), "known targets are h100"
    )
    assert_refused(
        run("plan", "--config=configs/quickstart.py", "--model-config=nowhere"),
        "--model-config='nowhere'",
    )
