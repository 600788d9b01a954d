"""Steps on virtual CPU devices that wait for each other for ever: the cause, and what prevents it.

Command:  python scripts/studies/virtual_devices.py --ahead=0 --threads=8    (waits for ever)
          python scripts/studies/virtual_devices.py --ahead=0 --threads=64
          python scripts/studies/virtual_devices.py --threads=8

Each runs joint steps of a tiny lens, as fast as the host can start them. If none is started for
``--patience`` seconds, the stacks of all Python threads are printed and the process exits with 1.

Cause: XLA's CPU client has one pool of threads, as many as cores (``NPROC``) or devices, whichever
is more. The pool starts programs, one task for each device, and runs them. A device has at most 32
unfinished programs. The tasks that start the 33rd wait for room *in threads of the pool*; if the
next program to run gets fewer threads than devices, its first collective waits for the missing ones
for ever. By gdb, of the 8 threads 7 were in the rendezvous and one in ``Semaphore::ScopedAcquire``.

So either the host stays fewer than 32 programs ahead of the devices, as the training loop does
(:class:`conlens_jax.parallel.host.RunAhead`), or the pool has two threads for each device (for one
thread of the host that starts programs; the tests have 64).

Measured with JAX 0.10.2 on 2 busy cores, 8 devices; "quick" are the XLA flags of tests/conftest.py:

    8 threads, no limit, quick               hung after 41 steps, and after more than 100
    8 threads, no limit, XLA's defaults      hung after more than 300 steps
    8 threads, at most 8 ahead, quick        1,000 steps in 90 s
    16 threads, no limit, XLA's defaults     1,000 steps in 76 s
    64 threads, no limit, quick              1,000 steps in 81 s
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from pathlib import Path

_COMPILATION_SECONDS = 300
_SHOWN_EVERY = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="NPROC; 0: the number of cores")
    parser.add_argument("--ahead", type=int, help="most unfinished steps; 0: no limit")
    parser.add_argument("--patience", type=float, default=30, help="seconds until it is a hang")
    flags = parser.parse_args()
    if flags.threads:
        os.environ["NPROC"] = str(flags.threads)  # read when JAX is imported
    os.environ["JAX_PLATFORMS"] = "cpu"
    run_steps(flags.steps, flags.devices, flags.ahead, flags.patience)


def run_steps(steps: int, devices: int, ahead: int | None, patience: float) -> None:
    """Joint steps of a tiny lens, data-parallel; ``ahead=None`` is the training loop's limit."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    sys.path.append(str(Path(__file__).parents[1]))
    from benchmark.workloads import shape_workload
    from conlens_jax.config import ExperimentConfig, MeshConfig, with_changes
    from conlens_jax.parallel.host import RunAhead
    from conlens_jax.parallel.mesh import batch_sharding, make_mesh, replicated
    from conlens_jax.training.state import init_state, make_step, stage_optimizer, stages_of

    changes = {"lens.text_len": 2, "warm.before": 1, "warm.after": 1, "model.unroll": 1}
    config = with_changes(ExperimentConfig(), {**changes, "joint.steps": steps})
    work = shape_workload("tiny", config, batch=devices, context=24)
    _, stage = stages_of(config)
    optimizer = stage_optimizer(stage, work.trainable, n_rows=devices)
    mesh = make_mesh(MeshConfig(data=devices))
    state, frozen = jax.device_put(
        (init_state(work.trainable, optimizer), work.frozen), replicated(mesh)
    )
    batch = jax.device_put(work.batch, batch_sharding(mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(
        stage, work.objective, optimizer, seed=0, n_rows=devices, state_shardings=shardings
    )
    faulthandler.dump_traceback_later(_COMPILATION_SECONDS, exit=True)
    with jax.set_mesh(mesh):
        step = step.lower(state, frozen, batch).compile()
    run_ahead = RunAhead() if ahead is None else RunAhead(ahead or steps)
    started = time.perf_counter()
    for done in range(1, steps + 1):
        faulthandler.dump_traceback_later(patience, exit=True)
        state, metrics = step(state, frozen, batch)
        run_ahead(metrics)
        if done % _SHOWN_EVERY == 0:
            print(f"{done} steps started, {time.perf_counter() - started:.0f} s", flush=True)
    faulthandler.dump_traceback_later(patience * 4, exit=True)
    jax.block_until_ready(state)
    faulthandler.cancel_dump_traceback_later()
    print(f"{steps} steps finished, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
