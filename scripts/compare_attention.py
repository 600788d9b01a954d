"""Compares cuDNN's flash attention (model.attention="cudnn") with the plain path, on a GPU.

Command:  python scripts/compare_attention.py --shape=1B --layers=4 --lengths 256 1025 4096

For each length: the relative error of the logits and of the gradient of the embeddings in bfloat16
with each kind of attention, against the plain path in float32 with full-precision products; and the
time of a forward and backward pass with each. The two errors should be similar: then the kernel is
as exact as bfloat16 allows. Random weights, ragged padding on both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmark.measure import Runner
from benchmark.workloads import SHAPES, model_shape
from conlens_jax.models.families import llama
from conlens_jax.models.param_table import init_params
from conlens_jax.models.transformer import forward

KINDS = {"float32": ("float32", "xla"), "xla": ("bfloat16", "xla"), "cudnn": ("bfloat16", "cudnn")}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = _parser().parse_args(arguments)
    rows = [compare(options, length) for length in options.lengths]
    print("| S | error xla | error cudnn | gradient xla | gradient cudnn | ms xla | ms cudnn |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        errors = [row[f"{what} {kind}"] for what in ("logits", "grad") for kind in ("xla", "cudnn")]
        times = [1e3 * row[f"seconds {kind}"] for kind in ("xla", "cudnn")]
        cells = [f"{error:.4f}" for error in errors] + [f"{time:.1f}" for time in times]
        print(f"| {row['length']} | " + " | ".join(cells) + " |")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def compare(options: argparse.Namespace, length: int) -> dict[str, Any]:
    """Errors and times at one length."""
    rng = np.random.default_rng(0)
    place = np.arange(length)
    first = rng.integers(0, length // 4, options.batch)[:, None]
    stop = rng.integers(3 * length // 4, length + 1, options.batch)[:, None]
    mask = (place >= first) & (place < stop)
    shape = model_shape(options.shape, length, unroll=1)
    shape = dataclasses.replace(shape, n_layers=options.layers)
    tokens = np.where(mask, rng.integers(0, shape.vocab_size, mask.shape), 0).astype(np.int32)
    found, outputs = {"length": length}, {}
    for kind, (dtype, attention) in KINDS.items():
        config = dataclasses.replace(shape, dtype=dtype, attention=attention)
        rows = llama.param_table(config)
        params = jax.jit(functools.partial(init_params, rows, config))(jax.random.key(0))

        def loss(params, tokens, mask, config=config):
            logits = forward(params, tokens, config=config, mask_BS=mask)
            kept = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
            return jnp.mean(jnp.sin(kept)), kept[:, -length // 2 :: 7]

        def run(params, tokens, mask, loss=loss):
            (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens, mask)
            return logits, grads["embedding"]

        precision = "highest" if kind == "float32" else None
        with jax.default_matmul_precision(precision):
            result, measured = Runner(options.repeat).measure(run, params, tokens, mask)
        outputs[kind] = [np.asarray(part, np.float32) for part in result]
        found[f"seconds {kind}"] = measured.seconds
        found[f"temp_bytes {kind}"] = measured.temp_bytes
        del params, result
    for kind in ("xla", "cudnn"):
        for place, what in enumerate(("logits", "grad")):
            exact = outputs["float32"][place]
            difference = np.linalg.norm(outputs[kind][place] - exact) / np.linalg.norm(exact)
            found[f"{what} {kind}"] = float(difference)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1B")
    parser.add_argument("--layers", type=int, default=4, help="number of layers; fp32 must fit too")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1025, 4096])
    parser.add_argument("--repeat", type=int, default=5, help="number of runs; the best counts")
    parser.add_argument("--json", default="", help="file for all numbers")
    return parser


if __name__ == "__main__":
    main()
