"""What a run will take, without weights: python -m conlens_jax.plan --config=configs/lens_simple.py

From a config.json alone: parameters, bytes of each device, FLOPs of a step; with ``--compile``
XLA's own memory analysis of the real train steps. ``model.path`` may be the hub id of a model in
``third_party/model_configs``, any other hub id (its config.json is fetched), a folder, or
``"embedded"``; ``--model-config`` gives a file instead. The mesh needs no devices: ``mesh.data``
(0 counts as 1), ``mesh.fsdp`` and ``mesh.tensor`` are numbers. ``--compile`` is for virtual CPU
devices; with ``--target=h100`` for GPUs, which need not be there either (but two wheels must).
"""

from __future__ import annotations

import sys

import jax
from absl import flags

from conlens_jax import cli
from conlens_jax.parallel.mesh import abstract_mesh, make_mesh
from conlens_jax.planning.gpu_target import target_mesh
from conlens_jax.planning.lens import make_plan
from conlens_jax.planning.model_source import planned_model
from conlens_jax.planning.report import print_plan
from conlens_jax.training.console import Console

_CONFIG = cli.define_config()
MODEL_CONFIG = flags.DEFINE_string(
    "model-config", "", "A config.json, or a folder with one, instead of model.path."
)
COMPILE = flags.DEFINE_bool("compile", False, "Compile the train steps for virtual devices.")
TARGET = flags.DEFINE_string("target", "", "Compile them for this GPU: h100.")


def main() -> None:
    config = cli.load_config(_CONFIG)
    mesh = config.mesh
    devices = (mesh.data or 1) * mesh.fsdp * mesh.tensor
    # Before the first use of JAX: planning never asks for an accelerator.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if TARGET.value:
        on = target_mesh(TARGET.value, mesh, devices)
    elif COMPILE.value:
        on = make_mesh(mesh)
    else:
        on = abstract_mesh(mesh, devices)
    plan = make_plan(config, planned_model(config, MODEL_CONFIG.value), on)
    print_plan(plan, Console(sys.stdout), compiled=COMPILE.value or bool(TARGET.value))


if __name__ == "__main__":
    cli.run(main)
