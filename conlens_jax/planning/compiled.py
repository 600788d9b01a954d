"""XLA's memory analysis of the real train step, compiled from shapes.

The step is compiled for virtual CPU devices in the mesh of the run, or for GPUs
(:mod:`conlens_jax.planning.gpu_target`). On a CPU XLA multiplies bfloat16 matrices as float32, may
keep float32 copies of the weights, and fuses less: for Llama-3.2-1B in bfloat16, trained in full on
8 devices along fsdp, temporary memory was 1.9 GiB (warm start) and 4.8 GiB (joint) for CPUs, 0.7
GiB and 1.8 GiB for H100s.
"""

from __future__ import annotations

import dataclasses
import time

import jax

from conlens_jax.planning.lens import Plan
from conlens_jax.training.state import Stage


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """Bytes per device of a compiled step, and the seconds of compilation.

    Inputs that the step does not use are not counted as arguments, although the run keeps them.
    """

    arguments: int
    temporary: int
    outputs: int
    aliased: int
    seconds: float

    @property
    def peak(self) -> int:
        """Outputs that reuse the memory of a donated argument are counted once."""
        return self.arguments + self.temporary + self.outputs - self.aliased


def compiled_program(plan: Plan, stage: Stage) -> jax.stages.Compiled:
    """A stage's step, compiled; ``plan.mesh`` must have devices."""
    with jax.set_mesh(plan.mesh):
        lowered = plan.step(stage).lower(
            plan.state(stage), plan.frozen_in(stage), plan.batch(stage)
        )
    return lowered.compile()


def memory_of(compiled: jax.stages.Compiled, seconds: float) -> CompiledMemory:
    """The compiler's memory analysis of a program.

    Raises:
      ValueError: the backend has no memory analysis.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError(f"--compile: the backend {jax.default_backend()!r} has no memory analysis")
    return CompiledMemory(
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.alias_size_in_bytes,
        seconds,
    )


def compile_step(plan: Plan, stage: Stage) -> CompiledMemory:
    """Compiles a stage's step; ``plan.mesh`` must have devices.

    Raises:
      ValueError: the backend has no memory analysis.
    """
    started = time.perf_counter()
    compiled = compiled_program(plan, stage)
    return memory_of(compiled, time.perf_counter() - started)
