"""Prints the plan of a config, for ``conlens_jax.plan`` and dry runs."""

from __future__ import annotations

import sys

import jax

from conlens_jax.config import ExperimentConfig
from conlens_jax.parallel.mesh import abstract_mesh, make_mesh, planned_mesh
from conlens_jax.planning.gpu_target import target_mesh
from conlens_jax.planning.lens import make_plan
from conlens_jax.planning.model_source import planned_model
from conlens_jax.planning.report import print_plan
from conlens_jax.tracking.console import Console


def show_plan(
    config: ExperimentConfig, model_config: str = "", *, compiled: bool, target: str = ""
) -> None:
    """Prints what is known without weights and devices. To be called before the first use of JAX: a
    plan never initialises an accelerator.

    Args:
      model_config: a config.json instead of ``model.path``.
      compiled: also compile the train steps, for virtual devices.
      target: compile for GPUs of this kind instead, which need not be present.
    """
    mesh, devices = planned_mesh(config.mesh)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if target:
        run_mesh = target_mesh(target, mesh, devices)
    else:
        run_mesh = make_mesh(mesh) if compiled else abstract_mesh(mesh, devices)
    print_plan(
        make_plan(config, planned_model(config, model_config), run_mesh),
        Console(sys.stdout),
        compiled=compiled,
    )
