"""Effect of keep_freed_memory(): the embedded model's gradient step with and without it.

Command:  python scripts/benchmark_malloc.py

Each variant runs in a separate process, since the setting cannot be undone; the two alternate, and
the best of the repetitions counts. On 2 CPU cores the ratio was 1.2 to 1.3.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

REPETITIONS, STEPS = 3, 8


def seconds_per_step() -> tuple[float, float]:
    """Wall-clock and system CPU seconds of one gradient step, batch 64, length 64."""
    import jax
    import jax.numpy as jnp

    from conlens_jax.config import EmbeddedConfig
    from conlens_jax.lens.losses import cross_entropy
    from conlens_jax.models.families import llama
    from conlens_jax.models.param_table import init_params
    from conlens_jax.models.transformer import forward
    from conlens_jax.models.transformer_config import TransformerConfig

    shape = EmbeddedConfig()
    config = TransformerConfig(
        family=llama.MODEL_TYPE,
        vocab_size=566,
        d_model=shape.d_model,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.d_model // shape.n_heads,
        d_mlp=shape.d_mlp,
        max_positions=256,
    )
    params = init_params(llama.param_table(config), config, jax.random.key(0))
    tokens = jnp.zeros((64, 64), jnp.int32)
    loss = lambda params: cross_entropy(forward(params, tokens, config=config), tokens).mean()
    step = jax.jit(jax.grad(loss))
    jax.block_until_ready(step(params))
    started, system = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
    for _ in range(STEPS):
        jax.block_until_ready(step(params))
    system = resource.getrusage(resource.RUSAGE_SELF).ru_stime - system
    return (time.perf_counter() - started) / STEPS, system / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", nargs="?", choices=("default", "keep"), help="this one alone")
    variant = parser.parse_args().variant
    if variant:
        from conlens_jax.parallel.host import keep_freed_memory

        if variant == "keep" and not keep_freed_memory():
            raise SystemExit("this C library does not support the settings")
        print(*seconds_per_step())
        return
    best = {}
    for _ in range(REPETITIONS):
        for variant in ("default", "keep"):
            out = subprocess.run(
                [sys.executable, __file__, variant], check=True, capture_output=True, text=True
            ).stdout
            measured = tuple(float(value) for value in out.split())
            best[variant] = min(best.get(variant, measured), measured)
    for variant, (wall, system) in best.items():
        print(
            f"{variant:8} {wall * 1000:6.0f} ms per step, {system * 1000:4.0f} ms system CPU time"
        )
    print(f"ratio    {best['default'][0] / best['keep'][0]:.2f}")


if __name__ == "__main__":
    main()
