"""Time and memory of compiled programs, and rates of matrix products and copies."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MATRIX_SIZES = {"cpu": (1024, 2048, 3072), "gpu": (4096, 8192), "tpu": (4096, 8192)}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of one program.

    Attributes:
      seconds: the best of the repetitions, without the first run.
      temp_bytes: XLA's temporary memory (None if the backend has no memory analysis).
      output_bytes: bytes of its outputs, which include the residuals of a forward pass.
      compile_seconds: time of tracing and compilation.
    """

    seconds: float
    temp_bytes: int | None
    output_bytes: int | None
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Runner:
    """Compiles and times programs; the best of ``repeat`` runs counts."""

    repeat: int

    def measure(self, function: Callable, *inputs: Any) -> tuple[Any, Measured]:
        """Jits and times ``function``; returns (outputs, measurements)."""
        compiled, compiling = self._compiled(jax.jit(function), *inputs)
        outputs = jax.block_until_ready(compiled(*inputs))
        seconds = []
        for _ in range(self.repeat):
            started = time.perf_counter()
            jax.block_until_ready(compiled(*inputs))
            seconds.append(time.perf_counter() - started)
        return outputs, Measured(min(seconds), *memory_of(compiled), compiling)

    def measure_step(self, step: Callable, state: Any, *inputs: Any) -> Measured:
        """Times a jitted step that donates its state and returns (new state, anything)."""
        compiled, compiling = self._compiled(step, state, *inputs)
        state, _ = jax.block_until_ready(compiled(state, *inputs))
        seconds = []
        for _ in range(self.repeat):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, *inputs))
            seconds.append(time.perf_counter() - started)
        return Measured(min(seconds), *memory_of(compiled), compiling)

    def _compiled(self, jitted: Any, *inputs: Any) -> tuple[jax.stages.Compiled, float]:
        started = time.perf_counter()
        compiled = jitted.lower(*inputs).compile()
        return compiled, time.perf_counter() - started


def memory_of(compiled: jax.stages.Compiled) -> tuple[int | None, int | None]:
    """(temporary bytes, output bytes) of a compiled program."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None, None
    return int(analysis.temp_size_in_bytes), int(analysis.output_size_in_bytes)


def row_rate(dtype: str, rows: int, width: int, repeat: int) -> float:
    """FLOP/s of products of ``rows`` vectors with a sequence of matrices [width, 4 width]: the
    limit of decoding, which reads the weights for few rows."""
    count = 8
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, width), (count, width, 4 * width), (count, 4 * width, width)
    x, up, down = (
        jax.random.normal(key, shape, jnp.dtype(dtype)) / shape[-2] ** 0.5
        for key, shape in zip(keys, shapes, strict=True)
    )

    @jax.jit
    def chain(x, up, down):
        for layer in range(count):
            x = (x @ up[layer]) @ down[layer]
        return x

    jax.block_until_ready(chain(x, up, down))
    best = 0.0
    for _ in range(repeat):
        started = time.perf_counter()
        jax.block_until_ready(chain(x, up, down))
        best = max(best, 16.0 * rows * width**2 * count / (time.perf_counter() - started))
    return best


def copy_rate(repeat: int) -> float:
    """Bytes/s of scaling a large array, counting both reads and writes."""
    size = (1 << 30) if jax.default_backend() == "gpu" else (1 << 27)
    scale = jax.jit(lambda x: x * 0.5)
    x = jnp.ones(size // 4, jnp.float32)
    jax.block_until_ready(scale(x))
    best = 0.0
    for _ in range(repeat):
        started = time.perf_counter()
        jax.block_until_ready(scale(x))
        best = max(best, 2.0 * size / (time.perf_counter() - started))
    return best


def peak_memory() -> int | None:
    """Peak bytes in use on the first device so far; None if the backend does not record it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def matmul_rate(dtype: str, repeat: int) -> float:
    """The best FLOP/s of several large square products in ``dtype``.

    At JAX's default precision, like the model's products: on a GPU fp32 may be TF32.
    """
    best = 0.0
    multiply = jax.jit(jnp.matmul)
    for size in MATRIX_SIZES.get(jax.default_backend(), MATRIX_SIZES["gpu"]):
        left = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
        jax.block_until_ready(multiply(left, left))
        for _ in range(repeat):
            started = time.perf_counter()
            jax.block_until_ready(multiply(left, left))
            best = max(best, 2.0 * size**3 / (time.perf_counter() - started))
    return best
