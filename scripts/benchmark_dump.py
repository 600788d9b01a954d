"""Speed of the dump: its forward pass, that of the whole model, and the machine's limit.

Command:  python scripts/benchmark_dump.py --shape=S --batch=64 --context=64 --positions=4
Time:     17 seconds on 2 CPU cores.

The dump stops after block L, so it needs no output head; it keeps ``--positions`` rows per
document. The limit is its matrix-product FLOPs (``conlens_jax/planning/flops.py``) at the rate of
large matrix products, all measured in one run. Tokenisation and writing are not included: the log
of ``python -m conlens_jax.dump`` has the samples/s of the whole dump.

Measured with the command above (fp32, L = 3 of 6 layers, 216 GFLOP/s): dump 1,346 samples/s, limit
1,941; the whole model 767, a ratio of 1.75.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmark.measure import Runner, matmul_rate
from benchmark.workloads import SHAPES, shape_workload
from conlens_jax.config import ExperimentConfig
from conlens_jax.lens.original import capture
from conlens_jax.models.transformer import forward
from conlens_jax.parallel.host import keep_freed_memory
from conlens_jax.planning.flops import dump_flops


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    config = ExperimentConfig()
    model = dataclasses.replace(config.model, dtype=options.dtype, unroll=options.unroll)
    config = dataclasses.replace(config, model=model)
    work = shape_workload(options.shape, config, batch=options.batch, context=options.context)
    spec, batch, original = work.spec, work.batch, work.frozen["original"]
    kept = jnp.linspace(0, options.context - 1, options.positions).astype(jnp.int32)

    def dump(original, tokens_BS, mask_BS):
        return capture(original, tokens_BS, mask_BS, spec=spec)[:, kept].astype(jnp.float32)

    def full(original, tokens_BS, mask_BS):
        return forward(original, tokens_BS, config=spec.model, mask_BS=mask_BS)

    inputs = (original, batch.tokens_GS, batch.mask_GS)
    rate = matmul_rate(options.dtype, options.repeat)
    seconds = {
        name: Runner(options.repeat).measure(function, *inputs)[1].seconds
        for name, function in (("dump", dump), ("full", full))
    }
    rate = max(rate, matmul_rate(options.dtype, options.repeat))
    flops, rows = dump_flops(work), options.batch * options.positions
    limits = {name: value / rate for name, value in flops.items()}
    result = {
        "matmul_flops_per_s": rate,
        "samples_per_s": {name: rows / value for name, value in seconds.items()},
        "samples_per_s_limit": {name: rows / value for name, value in limits.items()},
        "ratios": {
            "dump / full, samples per s": seconds["full"] / seconds["dump"],
            "dump / limit, seconds": seconds["dump"] / limits["dump"],
        },
    }
    print(
        f"shape {options.shape}, L {spec.layer} of {spec.model.n_layers} layers, "
        f"{options.batch} documents of {options.context} tokens, {options.positions} rows each, "
        f"{options.dtype}; matrix products {rate / 1e9:.1f} GFLOP/s"
    )
    for name, value in result["samples_per_s"].items():
        print(f"{name}: {value:.0f} samples/s (limit {result['samples_per_s_limit'][name]:.0f})")
    for name, value in result["ratios"].items():
        print(f"{name}: {value:.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="S")
    parser.add_argument("--batch", type=int, default=64, help="documents of a batch")
    parser.add_argument("--context", type=int, default=64, help="S, tokens per document")
    parser.add_argument("--positions", type=int, default=4, help="rows per document")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--unroll", type=int, default=0, help="model.unroll")
    parser.add_argument("--repeat", type=int, default=5, help="number of runs; the best counts")
    parser.add_argument("--json", default="", help="file for all numbers")
    return parser


if __name__ == "__main__":
    main()
