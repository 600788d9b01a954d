"""A mesh of GPUs that are not present, for compilation: XLA's GPU compiler needs no GPU.

The compiler is in two wheels besides JAX. Autotuning, which would need a device, is switched off,
and so are Triton's matrix products, whose tiles it chooses (cuBLAS is used instead); the memory
figures are still those of the real compiler.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from conlens_jax.config import ConfigError, MeshConfig
from conlens_jax.parallel.mesh import AXES, mesh_shape

_DEVICES_PER_HOST = 8
_WITHOUT_TUNING = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
# Source: xla/backends/gpu/target_config/specs/h100_sxm.txtpb of openxla/xla.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TARGETS = {"h100": _H100}


def target_mesh(target: str, config: MeshConfig, devices: int) -> Mesh:
    """The mesh of the run on ``devices`` GPUs of a kind of :data:`TARGETS`, eight per host.

    To be called before anything is compiled: it switches autotuning off.

    Raises:
      ConfigError: the target is unknown, its compiler is missing, or the devices do not fill hosts.
    """
    if target not in TARGETS:
        raise ConfigError([f"--target={target!r}: known targets are {', '.join(TARGETS)}"])
    if not _has_compiler():
        raise ConfigError(
            [
                f"--target={target} needs XLA's GPU compiler (not a GPU): "
                "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, in the version of JAX"
            ]
        )
    if devices > _DEVICES_PER_HOST and devices % _DEVICES_PER_HOST:
        raise ConfigError(
            [f"--target={target}: {devices} devices do not fill hosts of {_DEVICES_PER_HOST}"]
        )
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_WITHOUT_TUNING}".strip()
    hosts = max(devices // _DEVICES_PER_HOST, 1)
    topology = topologies.get_topology_desc(
        target,
        "cuda",
        topology=f"1x{hosts}x{devices // hosts}",
        target_config=TARGETS[target],
    )
    shape = mesh_shape(config, devices)
    grid = np.array(topology.devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _has_compiler() -> bool:
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    try:
        return any(importlib.util.find_spec(plugin) for plugin in plugins)
    except ModuleNotFoundError:  # there is no jax_plugins package
        return False
