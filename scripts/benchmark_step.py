"""Cost of a joint training step: each phase, a naive implementation, and the machine's limit.

Command:  python scripts/benchmark_step.py --shape=S --text-len=8 --batch=32 --context=64
          python scripts/benchmark_step.py --config=configs/quickstart.py
Time:     about 4 minutes for S at T = 8 with --unroll=1 on 2 CPU cores, most of it compiling the
          naive step; --no-naive and --phases=none skip parts.

It prints, for this implementation and for the naive one (``scripts/benchmark/naive.py``: the same
loss and exact gradient, without cache or optimisations), the time and XLA's temporary memory of
each phase as a separate program and of the whole step; the least matrix-product FLOPs of each phase
(formula in ``conlens_jax/planning/flops.py``) and the time they take at the rate of large matrix
products in the same dtype, measured before and after; and the ratios naive / ours and ours / limit.
``step detached`` (or ``step exact``) is our step with that ``lens.history_gradient``; ``step`` uses
``--history`` or the config, by default exact, as in the naive step. The rate of products with one
token of each text, which read the weights for few rows, is printed too, as a limit of decoding.

Shapes S (d 256, 6 layers, mlp 768, V 4,096), M (GPT-2 small's sizes in the Llama family), 1B, 8B
(Llama 3) and tiny have random weights and L in the middle; ``--config`` uses model, lens and loss
of a config file. Run nothing else on the machine: during a test run the step took twice as long.

Measured: see ``scripts/README.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmark.measure import (
    Measured,
    Runner,
    copy_rate,
    matmul_rate,
    peak_memory,
    row_rate,
)
from benchmark.phases import (
    decoding,
    naive_phases,
    naive_step,
    our_phases,
    our_step,
    with_history,
)
from benchmark.workloads import (
    SHAPES,
    comparable,
    config_workload,
    read_config_file,
    shape_workload,
)
from conlens_jax.config import ExperimentConfig, with_changes
from conlens_jax.parallel.host import keep_freed_memory
from conlens_jax.planning.flops import Workload, step_flops

MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    work, runner = workload_of(options), Runner(options.repeat)
    rate = matmul_rate(work.config.model.dtype, options.repeat)
    if options.phases == "all":
        ours = our_phases(work, runner)
        plain = naive_phases(work, runner) if options.naive else {}
    else:
        ours = decoding(work, runner) if options.phases == "decode" else {}
        ours["step"] = our_step(work, runner)
        plain = {"step": naive_step(work, runner)} if options.naive else {}
    for kind in {"exact", "detached"} - {work.spec.lens.history_gradient}:
        if options.phases != "decode":
            ours[f"step {kind}"] = our_step(with_history(work, kind), runner)
    exact = ours.get("step exact", ours["step"])
    peak_bytes = peak_memory()
    rate = max(rate, matmul_rate(work.config.model.dtype, options.repeat))
    bandwidth = copy_rate(options.repeat)
    result = {
        "workload": _description(work),
        "matmul_flops_per_s": rate,
        "copy_bytes_per_s": bandwidth,
        "peak_bytes": peak_bytes,
        "row_flops_per_s": row_rate(
            work.config.model.dtype,
            len(work.batch.positions_B),
            work.spec.model.d_model,
            5 * options.repeat,
        ),
        "ours": _plain(ours),
        "naive": _plain(plain),
        "least_flops": step_flops(work),
    }
    result["limit_seconds"] = result["least_flops"]["total"] / rate
    result["ratios"] = {"ours / limit": ours["step"].seconds / result["limit_seconds"]}
    if "decode" in ours:
        # Every token reads the decoder's weights once, for any number of rows.
        read_bytes = work.spec.text_len * parameter_bytes(work)
        result["ratios"]["decode: weight bytes read / copy rate"] = (
            read_bytes / ours["decode"].seconds / bandwidth
        )
    if options.naive:
        seconds, temp_bytes = plain["step"].seconds, plain["step"].temp_bytes
        result["ratios"] |= {
            "naive / ours": seconds / ours["step"].seconds,
            "naive / ours exact": seconds / exact.seconds,
            "naive / ours, temporary memory": _ratio(temp_bytes, ours["step"].temp_bytes),
        }
    print(report(result))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def parameter_bytes(work: Workload) -> int:
    """Bytes of the frozen model, without an embedding that is only looked up."""
    params = work.frozen["original"]
    looked_up = 0 if work.spec.model.tied_embeddings else params["embedding"].nbytes
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - looked_up


def workload_of(options: argparse.Namespace) -> Workload:
    config = read_config_file(options.config) if options.config else ExperimentConfig()
    changes = {
        "lens.text_len": options.text_len,
        "lens.train_decoder": options.train,
        "lens.train_encoder": options.train,
        "lens.history_gradient": options.history,
        "model.dtype": options.dtype,
        "model.unroll": options.unroll,
        "model.remat": options.remat,
        "model.attention": options.attention,
        "joint.batch_size": options.batch,
        "joint.rows_per_document": options.rows_per_document,
        "dump.seq_len": options.context,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.text_len is not None:  # the warm start's window has the text's length
        changes |= {"warm.before": options.text_len - 1, "warm.after": 1}
        changes["dump.min_position"] = max(config.dump.min_position, options.text_len)
    if options.rows_per_document:
        shared = max(options.rows_per_document, config.dump.positions_per_sequence)
        changes["dump.positions_per_sequence"] = shared
    config, changed = comparable(with_changes(config, changes))
    if changed:
        print(f"for the comparison with the naive step, changed: {', '.join(changed)}")
    sizes = {"batch": config.joint.batch_size, "context": config.dump.seq_len}
    if options.config:
        return config_workload(options.config, config, **sizes)
    return shape_workload(options.shape, config, **sizes)


def report(result: dict[str, Any]) -> str:
    work, rate, least = result["workload"], result["matmul_flops_per_s"], result["least_flops"]
    lines = [
        ", ".join(f"{name} {value}" for name, value in work.items()),
        f"matrix products: {rate / 1e9:.1f} GFLOP/s; with one token of each text: "
        f"{result['row_flops_per_s'] / 1e9:.1f}",
        f"copies: {result['copy_bytes_per_s'] / 1e9:.0f} GB/s, reads and writes",
        *([f"peak memory: {result['peak_bytes'] / 2**30:.1f} GiB"] if result["peak_bytes"] else []),
        "",
        "| phase | ms | temp MiB | least GFLOP | limit ms | ms / limit | naive ms | temp MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours, plain = result["ours"], result["naive"]
    for name in [*ours, *(name for name in plain if name not in ours)]:
        flops = least["total"] if name.startswith("step") else least.get(name)
        limit = None if flops is None else flops / rate
        mine, other = ours.get(name, {}), plain.get(name, {})
        cells = [
            _cell(mine.get("seconds"), 1e-3),
            _cell(mine.get("temp_bytes"), MIB),
            _cell(flops, 1e9, 2),
            _cell(limit, 1e-3),
            _cell(mine["seconds"] / limit if mine and limit else None, 1.0),
            _cell(other.get("seconds"), 1e-3),
            _cell(other.get("temp_bytes"), MIB),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for side in ("ours", "naive"):
        if "forward" in result[side]:
            kept = result[side]["forward"]["output_bytes"] or 0
            lines.append(f"{side}: forward keeps {kept / MIB:.0f} MiB for backward")
    lines += ["", *(f"{name}: {value:.2f}" for name, value in result["ratios"].items())]
    return "\n".join(lines)


def _cell(value: float | None, unit: float, digits: int = 1) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def _ratio(over: float | None, under: float | None) -> float:
    return over / under if over and under else math.nan


def _plain(phases: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(measured) for name, measured in phases.items()}


def _description(work: Workload) -> dict[str, Any]:
    spec, lens = work.spec, work.spec.lens
    return {
        "shape": work.name,
        "T": spec.text_len,
        "batch": len(work.batch.positions_B),
        "context": work.batch.tokens_GS.shape[1],
        "rows per document": work.batch.rows_per_document,
        "mean P": float(work.batch.positions_B.mean()),
        "L": spec.layer,
        "horizon": work.objective.loss.kl_horizon,
        "decoder": lens.train_decoder,
        "encoder": lens.train_encoder,
        "history": lens.history_gradient,
        "dtype": spec.model.dtype,
        "unroll": spec.model.unroll,
        "remat": spec.model.remat,
        "attention": spec.model.attention,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "jax": jax.__version__,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="", help="a config file: its model, lens and loss")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="S")
    parser.add_argument("--text-len", type=int, help="T; without --config 8")
    parser.add_argument("--batch", type=int, help="rows; without --config 32")
    parser.add_argument("--context", type=int, help="S; without --config 64")
    parser.add_argument(
        "--rows-per-document", type=int, help="rows that share a context; default 1"
    )
    parser.add_argument("--train", choices=("full", "lora", "frozen"), help="both clones")
    parser.add_argument("--history", help="lens.history_gradient of our step; default: config's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--unroll", type=int, help="model.unroll of both implementations")
    parser.add_argument("--remat", choices=("none", "products", "full"))
    parser.add_argument("--attention", choices=("xla", "cudnn"), help="model.attention")
    parser.add_argument("--repeat", type=int, default=3, help="number of runs; the best counts")
    parser.add_argument("--json", default="", help="file for all results")
    parser.add_argument(
        "--phases",
        choices=("all", "none", "decode"),
        default="all",
        help="all phases (all), only the whole steps (none), or only decoding and our step",
    )
    parser.add_argument(
        "--no-naive", dest="naive", action="store_false", help="only this implementation"
    )
    return parser


if __name__ == "__main__":
    main()
