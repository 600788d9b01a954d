"""Time and memory of a mixture of experts in its forms (conlens_jax/models/experts.py).

Command:  python scripts/benchmark_experts.py --tokens 1 8 32 512 2048 --dtype float32 bfloat16

One layer's experts with random weights, of the shape of Qwen3-30B-A3B unless told otherwise: the
forward pass, with the gradient of the inputs, and with that of the matrices too. All forms are
timed in one run; a program that needs more temporary memory than ``--memory`` is not run (``-``).
The limit is the products of the chosen experts at the rate of large products in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmark.measure import matmul_rate, memory_of
from conlens_jax.models.families import config_from_hf
from conlens_jax.models.mlp import mix_experts
from conlens_jax.models.products import Products
from conlens_jax.models.transformer_config import TransformerConfig

FORMS = ("blocks", "ragged", "dense")
# By name, with the FLOPs relative to the forward pass.
PASSES = {"forward": 1, "inputs": 2, "weights": 3}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = _parser().parse_args(arguments)
    times, sizes = ([f"{form}, {unit}" for form in options.forms] for unit in ("ms", "MiB"))
    header = ["dtype", "tokens", "pass", *times, "last / first", "limit, ms", *sizes]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    rows = []
    for dtype in options.dtype:
        config = layer_config(options, dtype)
        weights = random_weights(config)
        rate = matmul_rate(dtype, options.repeat)
        for tokens in options.tokens:
            for name in options.passes:
                rows.append(compare(options, config, weights, tokens, name, rate))
                print(_line(rows[-1], options.forms), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def layer_config(options: argparse.Namespace, dtype: str) -> TransformerConfig:
    values = {"model_type": "qwen3_moe", "hidden_size": options.width}
    values |= {"moe_intermediate_size": options.mlp, "num_experts": options.experts}
    values |= {"num_experts_per_tok": options.chosen, "norm_topk_prob": True}
    return dataclasses.replace(config_from_hf(values), dtype=dtype)


def random_weights(config: TransformerConfig) -> dict[str, jax.Array]:
    d, f, e = config.d_model, config.d_mlp, config.n_experts
    shapes = {"router": (d, e), "gate": (e, d, f), "up": (e, d, f), "down": (e, f, d)}
    draw = lambda key, shape: jax.random.normal(key, shape, config.dtype) * shape[-2] ** -0.5
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: draw(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}


def compare(options, config, weights, tokens: int, name: str, rate: float) -> dict[str, Any]:
    """Seconds and temporary bytes of each form; None for seconds if it was not run."""
    x_BSD = jax.random.normal(jax.random.key(1), (1, tokens, config.d_model), config.dtype)
    pairs = tokens * config.experts_per_token
    flops = 6.0 * pairs * config.d_model * config.d_mlp * PASSES[name]
    found = {"dtype": config.dtype, "tokens": tokens, "pass": name, "limit": flops / rate}
    for form in options.forms:
        program = make_pass(name, dataclasses.replace(config, experts=form))
        compiled = jax.jit(program).lower(weights, x_BSD).compile()
        n_bytes, _ = memory_of(compiled)
        too_large = n_bytes is not None and n_bytes > options.memory * 2**30
        seconds = None if too_large else best_of(options.repeat, compiled, weights, x_BSD)
        found[form], found[f"{form} bytes"] = seconds, n_bytes
    return found


def make_pass(name: str, config: TransformerConfig) -> Callable:
    def forward(weights, x_BSD):
        return mix_experts(x_BSD, Products(weights), config)

    def loss(weights, x_BSD):
        return jnp.mean(jnp.square(forward(weights, x_BSD).astype(jnp.float32)))

    wanted = {"inputs": 1, "weights": (0, 1)}
    return forward if name == "forward" else jax.grad(loss, wanted[name])


def best_of(repeat: int, compiled: jax.stages.Compiled, *inputs: Any) -> float:
    """The first run is not counted."""
    seconds = []
    for _ in range(1 + repeat):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _line(row: dict[str, Any], forms: Sequence[str]) -> str:
    times = ["-" if row[form] is None else f"{1e3 * row[form]:.1f}" for form in forms]
    first, last = row[forms[0]], row[forms[-1]]
    ratio = f"{last / first:.1f}" if first and last else "-"
    sizes = [f"{(row[f'{form} bytes'] or 0) / 2**20:,.0f}" for form in forms]
    cells = [row["dtype"], str(row["tokens"]), row["pass"], *times, ratio]
    return "| " + " | ".join([*cells, f"{1e3 * row['limit']:.1f}", *sizes]) + " |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--chosen", type=int, default=8, help="experts per token")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=768, help="width of an expert")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512, 2048])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=list(PASSES))
    parser.add_argument("--forms", nargs="+", default=["blocks", "dense"], choices=FORMS)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of temporary memory")
    parser.add_argument("--repeat", type=int, default=3, help="number of runs; the best counts")
    parser.add_argument("--json", default="", help="file for all numbers")
    return parser


if __name__ == "__main__":
    main()
