"""Speed of explaining: the first explanations of a document, then all of them, beside the limit.

Command:  python scripts/benchmark_explain.py --checkpoint=smollm2-135m --tokens=2000
Time:     on 2 CPU cores 15 seconds for the quickstart's lens, a minute for SmolLM2-135M's with 256
          tokens.

A document of ``--tokens`` tokens (the lens's example text, repeated) at every position, greedy,
with support and the KL of the swap. *First*: until the first batch is there, in a new process, with
compilation, and again. *Limit*: the least matrix-product FLOPs of it all
(``conlens_jax/planning/flops.py``) at the rate of large products, measured before and after in the
same run. Measured: see "What explaining costs" in ``scripts/README.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.measure import matmul_rate
from conlens_jax import Lens
from conlens_jax.explorer.examples import example_text
from conlens_jax.parallel.host import keep_freed_memory
from conlens_jax.planning.flops import explain_flops


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    started = time.perf_counter()
    lens = Lens.load(options.checkpoint)
    seconds = {"load": time.perf_counter() - started}
    example = lens.model.tokenizer.encode(example_text(lens), add_bos=lens.add_bos)
    length = min(options.tokens, lens.model.config.max_positions)
    tokens = list(itertools.islice(itertools.cycle(example), length))
    positions = np.arange(length)
    batches = lambda: lens.explain_in_batches(
        [tokens], positions.tolist(), batch_size=options.batch, whole=True
    )
    for name in ("first batch, with compilation", "first batch"):
        started = time.perf_counter()
        next(batches())
        seconds[name] = time.perf_counter() - started
    dtype = lens.spec.model.dtype
    rate = matmul_rate(dtype, options.repeat)
    started = time.perf_counter(), time.process_time()
    found = sum(len(rows) for rows in batches())
    seconds["all"] = time.perf_counter() - started[0]
    seconds["all, CPU"] = time.process_time() - started[1]
    rate = max(rate, matmul_rate(dtype, options.repeat))
    limit = explain_flops(lens.spec, positions) / rate
    result = {
        "seconds": seconds,
        "explanations": found,
        "explanations_per_s": found / seconds["all"],
        "matmul_flops_per_s": rate,
        "share": limit / seconds["all"],
    }
    for name, value in seconds.items():
        print(f"{name}: {value:.1f} s")
    print(
        f"{found} explanations of {lens.spec.text_len} tokens, "
        f"{result['explanations_per_s']:.1f} a second: {result['share']:.0%} of what matrix "
        f"products at {rate / 1e9:.0f} GFLOP/s allow"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="run, saved lens, or a shipped one")
    parser.add_argument(
        "--tokens", type=int, default=2000, help="of the document; at most the model's positions"
    )
    parser.add_argument("--batch", type=int, default=32, help="explanations at a time")
    parser.add_argument("--repeat", type=int, default=5, help="of the products; the best counts")
    parser.add_argument("--json", default="", help="file for all numbers")
    return parser


if __name__ == "__main__":
    main()
