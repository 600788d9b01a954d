"""Settings of devices and processes: where a run is computed."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices on each mesh axis."""

    # Instead of numbers: "single" (the first device alone), "data8", "fsdp8", "fsdp2_tensor4", or
    # "multislice": data over the slices, tensor (a number still) and fsdp over the devices of each,
    # so that only gradients cross the slow network.
    preset: str = ""
    data: int = 0  # copies of the model that share the batch; 0: all devices that remain
    fsdp: int = 1  # devices that share the batch and each parameter, split along the width
    tensor: int = 1  # devices that share heads, mlp and vocabulary
    # Slices of "multislice"; 0: as many as the devices report (TPU), else one per process.
    slices: int = 0


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes for one dump, run or evaluation. All get the same config, apart from
    ``process_id``, and see the same files."""

    # "host:port" of process 0; "auto": Slurm, Open MPI, Kubernetes and TPU provide it and the two
    # numbers below (Slurm: one process per GPU); empty: a single process.
    coordinator: str = ""
    num_processes: int = 0  # how many there are; 0 without "host:port"
    process_id: int = -1  # which one this is, from 0; -1 without "host:port"
    timeout: int = 60  # seconds without an answer until a process counts as dead and the rest stop


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """What ``conlens_jax.train`` does instead of training."""

    dry_run: bool = False  # compile the train steps from shapes alone, print memory, and exit


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A profile of some steps, in ``<run_dir>/profile``."""

    steps: tuple = (0, 0)  # (first, last), counted over the whole run; both 0: none
