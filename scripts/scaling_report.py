"""How a step scales with the number of devices, from compiled programs: no devices are needed.

    python scripts/scaling_report.py --config=configs/llama3_1_8b_8xh100.py --target=h100

Without ``--target`` the programs are compiled for CPUs, which needs no further wheels
(:mod:`conlens_jax.planning.gpu_target`) but takes more memory.

For each count (see :mod:`benchmark.scaling`): bytes and FLOPs per device, bytes that a
device sends per step by each collective, and the seconds that these would take on H100s without
overlap:

    compute      FLOPs / 400e12
    NVLink       bytes within 8 devices / 450e9
    InfiniBand   bytes between slices / 50e9

They are predictions from counts. FLOPs are the minimum for the step. Compilation takes minutes per
device count; each row is printed as soon as it is known.
"""

from __future__ import annotations

import sys

import jax
from absl import flags

from benchmark.scaling import HEADER, report_row
from conlens_jax import cli
from conlens_jax.config import ConfigError
from conlens_jax.tracking.console import Console

_CONFIG = cli.define_config()
DEVICES = flags.DEFINE_list(
    "devices", "1,2,4,8,64,512".split(","), "Device counts, comma-separated."
)
STAGE = flags.DEFINE_enum("stage", "joint", ["warm", "joint"], "Whose step.")
TARGET = flags.DEFINE_string("target", "", "Compile for this GPU, which need not be present: h100.")


def main() -> None:
    config = cli.load_config(_CONFIG)
    if not all(text.isdigit() and int(text) for text in DEVICES.value):
        raise ConfigError(f"--devices={','.join(DEVICES.value)} must be whole numbers above 0")
    counts = sorted(map(int, DEVICES.value))
    jax.config.update("jax_platforms", "cpu")
    if not TARGET.value:
        jax.config.update("jax_num_cpu_devices", counts[-1])
    rows = []
    for count in counts:
        rows.append(report_row(config, count, STAGE.value, TARGET.value))
        print(*rows[-1], sep="  ", flush=True)
    Console(sys.stdout).table(f"a {STAGE.value} step, weak scaling", HEADER, rows)


if __name__ == "__main__":
    cli.run(main)
