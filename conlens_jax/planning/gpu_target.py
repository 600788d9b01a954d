"""A mesh of GPUs that are not present, for compilation: XLA's GPU compiler needs no GPU.

The compiler is in two wheels besides JAX. Autotuning, which would need a device, is switched off,
and so are Triton's matrix products, whose tiles it chooses (cuBLAS is used instead); the memory
figures are still those of the real compiler.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import os

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from conlens_jax.config import ConfigError, MeshConfig
from conlens_jax.parallel.mesh import AXES, AXIS_TYPES, mesh_shape

_DEVICES_PER_HOST = 8
_WITHOUT_TUNING = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
# h100: xla/backends/gpu/target_config/specs/h100_sxm.txtpb of openxla/xla.
TARGETS = ("h100",)
"""GPUs that are described beside this file."""


def target_mesh(target: str, config: MeshConfig, devices: int) -> Mesh:
    """The mesh of the run on ``devices`` GPUs of one of :data:`TARGETS`, eight per host.

    To be called before anything is compiled: it switches autotuning off.

    Raises:
      ConfigError: the target is unknown, its compiler is missing, or the devices do not fill hosts.
    """
    if target not in TARGETS:
        raise ConfigError(f"--target={target!r}: known targets are {', '.join(TARGETS)}")
    if not _has_compiler():
        raise ConfigError(
            f"--target={target} needs XLA's GPU compiler (not a GPU): "
            "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, in the version of JAX"
        )
    if devices > _DEVICES_PER_HOST and devices % _DEVICES_PER_HOST:
        raise ConfigError(
            f"--target={target}: {devices} devices do not fill hosts of {_DEVICES_PER_HOST}"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_WITHOUT_TUNING}".strip()
    hosts = max(devices // _DEVICES_PER_HOST, 1)
    described = importlib.resources.files(__package__).joinpath(f"{target}.txtpb")
    topology = topologies.get_topology_desc(
        target,
        "cuda",
        topology=f"1x{hosts}x{devices // hosts}",
        target_config=described.read_text("utf-8"),
    )
    grid = np.array(topology.devices).reshape(mesh_shape(config, devices))
    return Mesh(grid, AXES, axis_types=AXIS_TYPES)


def _has_compiler() -> bool:
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    try:
        return any(importlib.util.find_spec(plugin) for plugin in plugins)
    except ModuleNotFoundError:  # there is no jax_plugins package
        return False
