"""How a step grows with the devices, from compiled programs: no devices are needed.

    python scripts/scaling_report.py --config=configs/llama3_1_8b_8xh100.py --devices=1,2,4,8

The rows of a device stay the same (weak scaling): the config's batch is that of 8 devices. Up to 8
devices they are one ``fsdp`` axis; more are slices of 8, ``data`` over the slices. For each count:
bytes and FLOPs of a device, bytes that it sends by each collective in a step, and the seconds that
these numbers would take on H100s if nothing overlapped:

    compute      FLOPs / 400e12 (40 % of the bf16 peak of 989e12, a usual figure)
    NVLink       bytes within 8 devices / 450e9 (900 GB/s in both directions together)
    InfiniBand   bytes between slices / 50e9 (400 Gb/s for each GPU)

They are predictions from counts. FLOPs are the least that the step needs; XLA's CPU compiler
decides which collectives there are, and a GPU's may merge or replace some of them.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Sequence

import jax
from absl import flags

from conlens_jax import cli
from conlens_jax.benchmark.flops import step_flops, supervised_flops
from conlens_jax.config import ConfigError, ExperimentConfig, MeshConfig
from conlens_jax.parallel.footprint import in_units
from conlens_jax.parallel.mesh import make_mesh
from conlens_jax.planning.collectives import KINDS, Collective, collectives_of
from conlens_jax.planning.compiled import compiled_program, memory_of
from conlens_jax.planning.lens import Plan, make_plan
from conlens_jax.planning.model_source import planned_model
from conlens_jax.training.console import Console
from conlens_jax.training.state import Stage, stages_of

_CONFIG = cli.define_config()
DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Device counts, with commas between.")
STAGE = flags.DEFINE_enum("stage", "joint", ["warm", "joint"], "Whose step.")

SLICE = 8
FLOPS_PER_SECOND, NVLINK, INFINIBAND = 400e12, 450e9, 50e9


def main() -> None:
    config = cli.load_config(_CONFIG)
    if not all(text.isdigit() and int(text) for text in DEVICES.value):
        raise ConfigError([f"--devices={','.join(DEVICES.value)} must be whole numbers above 0"])
    counts = sorted(map(int, DEVICES.value))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", counts[-1])
    rows = [report_row(config, count, STAGE.value) for count in counts]
    Console(sys.stdout).table(f"a {STAGE.value} step, weak scaling", HEADER, rows)


HEADER = [
    *("devices", "data×fsdp", "rows", "bytes", "FLOPs", *KINDS),
    *("compute s", "NVLink s", "InfiniBand s"),
]


def report_row(config: ExperimentConfig, devices: int, stage_name: str) -> list[str]:
    """One device count; all numbers are one device's."""
    plan, stage = plan_for(config, devices, stage_name)
    compiled = compiled_program(plan, stage)
    found = collectives_of(compiled.as_text())
    sent: collections.Counter[str] = collections.Counter()
    for each in found:
        sent[each.kind] += each.total_bytes
    flops = flops_of(plan, stage) / devices
    inside, between = seconds_of(found)
    return [
        str(devices),
        f"{plan.mesh.shape['data']}×{plan.mesh.shape['fsdp']}",
        str(stage.batch_size),
        in_units(memory_of(compiled, 0.0).peak),
        f"{flops:.2e}",
        *(in_units(sent[kind]) for kind in KINDS),
        f"{flops / FLOPS_PER_SECOND:.3f}",
        f"{inside:.3f}",
        f"{between:.3f}",
    ]


def plan_for(config: ExperimentConfig, devices: int, stage_name: str) -> tuple[Plan, Stage]:
    """The config on so many devices, with as many rows each as on 8."""
    fsdp = min(devices, SLICE)
    mesh = MeshConfig(data=devices // fsdp, fsdp=fsdp)
    grown = lambda rows: rows * devices // SLICE or 1
    config = dataclasses.replace(
        config,
        mesh=mesh,
        warm=dataclasses.replace(config.warm, batch_size=grown(config.warm.batch_size)),
        joint=dataclasses.replace(config.joint, batch_size=grown(config.joint.batch_size)),
        # These programs are not compiled here; any batch that the mesh divides will do.
        dump=dataclasses.replace(config.dump, batch_size=devices),
        evaluate=dataclasses.replace(config.evaluate, batch_size=devices),
    )
    on = make_mesh(mesh, jax.devices()[:devices])
    plan = make_plan(config, planned_model(config), on)
    return plan, next(stage for stage in stages_of(config) if stage.name == stage_name)


def flops_of(plan: Plan, stage: Stage) -> float:
    work = plan.workload(stage)
    return sum(supervised_flops(work).values()) if stage.supervised else step_flops(work)["total"]


def seconds_of(found: Sequence[Collective]) -> tuple[float, float]:
    """On NVLink and on InfiniBand: a group within one slice, or across."""
    seconds = [0.0, 0.0]
    for each in found:
        across = len({device // SLICE for device in each.group}) > 1
        seconds[across] += each.total_bytes / (INFINIBAND if across else NVLINK)
    return seconds[0], seconds[1]


if __name__ == "__main__":
    cli.run(main)
