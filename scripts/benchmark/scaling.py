"""How a step scales with the number of devices, from compiled programs.

The rows per device are constant (weak scaling): batch and mesh of the config are those for 8
devices. With fewer devices the axes shrink, ``fsdp`` before ``tensor``; more devices are slices of
8, with ``data`` across them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import jax

from benchmark.collectives import KINDS, Collective, collectives_of
from conlens_jax.config import ExperimentConfig, MeshConfig
from conlens_jax.parallel.footprint import in_units
from conlens_jax.parallel.mesh import make_mesh, mesh_shape, planned_mesh
from conlens_jax.planning.compiled import compiled_program, memory_of
from conlens_jax.planning.flops import step_flops, supervised_flops
from conlens_jax.planning.gpu_target import target_mesh
from conlens_jax.planning.lens import Plan, make_plan
from conlens_jax.planning.model_source import planned_model
from conlens_jax.training.state import Stage, stages_of

SLICE = 8
# 40 % of an H100's 989e12 in bf16, a usual figure; 900 GB/s in both directions together; 400 Gb/s
# for each GPU.
FLOPS_PER_SECOND, NVLINK, INFINIBAND = 400e12, 450e9, 50e9
HEADER = [
    *("devices", "data×fsdp×tensor", "rows", "bytes", "FLOPs", *KINDS),
    *("compute s", "NVLink s", "InfiniBand s"),
]


def report_row(
    config: ExperimentConfig, devices: int, stage_name: str, target: str = ""
) -> list[str]:
    """The row of one device count; all numbers are per device.

    Args:
      target: GPUs of this kind (:mod:`~conlens_jax.planning.gpu_target`) instead of CPU devices.
    """
    plan, stage = plan_for(config, devices, stage_name, target)
    compiled = compiled_program(plan, stage)
    found = collectives_of(compiled.as_text())
    sent: collections.Counter[str] = collections.Counter()
    for each in found:
        sent[each.kind] += each.total_bytes
    flops = flops_of(plan, stage) / devices
    inside, between = seconds_of(found)
    return [
        str(devices),
        "×".join(map(str, plan.mesh.shape.values())),
        str(stage.batch_size),
        in_units(memory_of(compiled, 0.0).peak),
        f"{flops:.2e}",
        *(in_units(sent[kind]) for kind in KINDS),
        f"{flops / FLOPS_PER_SECOND:.3f}",
        f"{inside:.3f}",
        f"{between:.3f}",
    ]


def plan_for(
    config: ExperimentConfig, devices: int, stage_name: str, target: str = ""
) -> tuple[Plan, Stage]:
    """The config on ``devices`` devices, with the same rows per device as on 8."""
    inside = min(devices, SLICE)
    *_, tensor = mesh_shape(*planned_mesh(config.mesh))
    tensor = min(tensor, inside)
    mesh = MeshConfig(data=devices // inside, fsdp=inside // tensor, tensor=tensor)
    grown = lambda rows: rows * devices // SLICE or 1
    config = dataclasses.replace(
        config,
        mesh=mesh,
        warm=dataclasses.replace(config.warm, batch_size=grown(config.warm.batch_size)),
        joint=dataclasses.replace(config.joint, batch_size=grown(config.joint.batch_size)),
        # These programs are not compiled here: any batch that the mesh divides.
        dump=dataclasses.replace(config.dump, batch_size=devices),
        evaluate=dataclasses.replace(config.evaluate, batch_size=devices),
    )
    if target:
        run_mesh = target_mesh(target, mesh, devices)
    else:
        run_mesh = make_mesh(mesh, jax.devices()[:devices])
    plan = make_plan(config, planned_model(config), run_mesh)
    return plan, next(stage for stage in stages_of(config) if stage.name == stage_name)


def flops_of(plan: Plan, stage: Stage) -> float:
    work = plan.workload(stage)
    return sum(supervised_flops(work).values()) if stage.supervised else step_flops(work)["total"]


def seconds_of(found: Sequence[Collective]) -> tuple[float, float]:
    """Seconds on NVLink (groups within one slice) and on InfiniBand (groups across slices)."""
    seconds = [0.0, 0.0]
    for each in found:
        across = len({device // SLICE for device in each.group}) > 1
        seconds[across] += each.total_bytes / (INFINIBAND if across else NVLINK)
    return seconds[0], seconds[1]
