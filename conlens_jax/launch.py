"""Starts several processes on one machine, to try out a distributed run:

    python -m conlens_jax.launch --processes=2 --devices=4 -- \\
        conlens_jax.train --config=configs/quickstart.py

Each process has ``--devices`` virtual CPU devices. After ``--`` come a module and its flags; the
flags with the number of each process are added. If a process fails, the others are killed after
``--grace`` seconds, in which they can print why they stop; SIGTERM and Ctrl-C are forwarded to all
processes. The exit code is that of the first process that failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

_POLL_SECONDS = 0.1


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own flags, and the module with its flags."""
    own, command = list(arguments), []
    if "--" in own:
        cut = own.index("--")
        own, command = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser(prog="conlens_jax.launch")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="virtual CPU devices per process")
    parser.add_argument(
        "--grace", type=float, default=30.0, help="seconds before the others are killed"
    )
    flags = parser.parse_args(own)
    if flags.processes < 1 or flags.devices < 1:
        parser.error("--processes and --devices must be at least 1")
    if not command:
        parser.error("give the command after --, such as: -- conlens_jax.train --config=…")
    return flags, command


def start(
    command: Sequence[str], processes: int, devices: int, **streams: object
) -> list[subprocess.Popen]:
    """Starts the processes of a run; ``streams`` go to :class:`subprocess.Popen`."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    shared = [
        f"--config.distributed.coordinator=localhost:{_free_port()}",
        f"--config.distributed.num_processes={processes}",
    ]
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", *command, *shared),
                f"--config.distributed.process_id={number}",
            ],
            env=environment,
            **streams,
        )
        for number in range(processes)
    ]


def wait(running: Sequence[subprocess.Popen], grace: float) -> int:
    """Waits for all; kills those that still run ``grace`` seconds after one has failed."""
    first_failure, deadline = 0, float("inf")
    while None in [process.poll() for process in running]:  # polls every one of them
        failed = [process.returncode for process in running if process.returncode]
        if failed and not first_failure:
            first_failure, deadline = failed[0], time.monotonic() + grace
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(_POLL_SECONDS)
    failed = [process.returncode for process in running if process.returncode]
    return first_failure or (failed[0] if failed else 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def main(arguments: Sequence[str]) -> int:
    flags, command = parse(arguments)
    running = start(command, flags.processes, flags.devices)

    def forward(number: int, _: object) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return wait(running, flags.grace)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(128 - code if code < 0 else code)
