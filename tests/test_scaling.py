"""Weak scaling on paper: what a device keeps and does as devices and rows grow together."""

from __future__ import annotations

import dataclasses

import pytest
from test_plan import config_of
from tiny_models import write_tiny_folder

from benchmark.collectives import Collective
from benchmark.scaling import flops_of, plan_for, seconds_of
from conlens_jax.config import MeshConfig
from conlens_jax.parallel.footprint import device_bytes
from conlens_jax.planning.memory import step_memory

COUNTS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """The joint stage of a tiny model with 2 rows for each device."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_folder(folder)
    mesh = {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1}
    config = config_of(folder, **mesh, **{"joint.batch_size": 16, "joint.rows_per_document": 1})
    return {count: plan_for(config, count, "joint") for count in COUNTS}


def test_what_is_kept_is_split_and_what_is_made_stays(plans):
    stored, made = {}, {}
    for count, (plan, stage) in plans.items():
        assert stage.batch_size == 2 * count and plan.mesh.shape["fsdp"] == count
        stored[count] = device_bytes(plan.state(stage)) + device_bytes(plan.frozen["original"])
        made[count] = {part.name: part.n_bytes for part in step_memory(plan, stage)}
    small = device_bytes({k: v for k, v in plans[8][0].trainable["encoder"].items() if k != "base"})
    for count in COUNTS[1:]:
        assert stored[1] / count <= stored[count] <= stored[1] / count + 12 * small
        for name in ("activations", "logits", "decode cache"):
            assert made[count][name] == made[1][name]


def test_work_of_a_device_stays(plans):
    flops = [flops_of(*plans[count]) / count for count in COUNTS]
    assert flops == pytest.approx([flops[0]] * len(COUNTS), rel=0.05)


def test_more_than_a_slice_sends_gradients_between_slices():
    inside = Collective("all-gather", 2, 450e9, tuple(range(8)))
    across = Collective("all-reduce", 1, 50e9, (0, 8))
    assert seconds_of([inside, across]) == (2.0, 1.0)


def test_counts_become_meshes(plans):
    config = plans[8][0].config
    split = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    for given, devices, shape in (
        (config, 8, (1, 8, 1)),
        (config, 4, (1, 4, 1)),
        (split, 8, (1, 4, 2)),
        (split, 2, (1, 1, 2)),
    ):
        plan, _ = plan_for(given, devices, "warm")
        assert tuple(plan.mesh.shape.values()) == shape
