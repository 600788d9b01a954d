"""All checks and benchmarks on a GPU, in one command with a time limit.

Command:  python scripts/gpu_report.py --out=runs/gpu --seconds=540
          python scripts/gpu_report.py --out=runs/gpu --only=step-1B,attention

Each check is a separate process with a time limit; one that fails or is stopped does not stop the
rest. All logs and JSON files are in ``--out``; the last lines are a table of outcomes and the
tables printed by the checks. Nothing is downloaded, and neither wandb nor datasets is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STEP_1B = (
    "scripts/benchmark_step.py --shape=1B --text-len=32 --batch=128 --context=256 "
    "--dtype=bfloat16 --unroll=1 --remat=products --train=full --no-naive"
)
STEP_8B = (
    "scripts/benchmark_step.py --shape=8B --text-len=32 --batch=64 --context=256 "
    "--dtype=bfloat16 --unroll=1 --remat=full --train=lora --no-naive"
)
# Files whose tests need no mesh of 8 devices. Products in full fp32, like the oracles.
TESTS = (
    "-m pytest -q -x --maxfail=20 -p no:cacheprovider tests/test_transformer.py "
    "tests/test_decoder.py tests/test_estimators.py tests/test_lens_parts.py "
    "tests/test_swap_positions.py tests/test_generate.py tests/test_quantized.py "
    "tests/test_objective.py tests/test_vocabulary.py tests/test_gumbel.py"
)


@dataclass(frozen=True)
class Check:
    """A command and its time limit in seconds."""

    name: str
    command: str
    seconds: int
    environment: tuple[tuple[str, str], ...] = ()


CHECKS = (
    Check("tests", TESTS, 200, (("JAX_DEFAULT_MATMUL_PRECISION", "highest"),)),
    Check(
        "quickstart",
        "-m conlens_jax.quickstart --config=configs/quickstart.py --config.run_dir={out}/run "
        "--config.dump.cache_dir={scratch}/cache --config.embedded.cache_dir={scratch}/models "
        "--config.wandb.mode=disabled",
        300,
    ),
    Check("step-1B", STEP_1B + " --json={out}/step-1B.json", 240),
    Check(
        "step-1B-cudnn",
        STEP_1B + " --attention=cudnn --phases=none --json={out}/step-1B-cudnn.json",
        150,
    ),
    Check("step-8B", STEP_8B + " --json={out}/step-8B.json", 300),
    Check("attention", "scripts/compare_attention.py --json={out}/attention.json", 150),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(options.scratch or out / "scratch").absolute()
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    deadline, rows, logs = time.monotonic() + options.seconds, [], []
    for check in chosen:
        left = deadline - time.monotonic()
        log = out / f"{check.name}.log"
        if left < 15:
            rows.append({"check": check.name, "outcome": "no time left", "seconds": 0.0})
            continue
        started = time.monotonic()
        outcome = run(check, log, min(check.seconds, left), out, scratch)
        rows.append(
            {"check": check.name, "outcome": outcome, "seconds": time.monotonic() - started}
        )
        logs.append(log)
        (out / "gpu_report.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for log in logs:
        print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-28:]))
    print("\n| check | outcome | seconds |\n|---|---|---|")
    for row in rows:
        print(f"| {row['check']} | {row['outcome']} | {row['seconds']:.0f} |")
    return int(any(row["outcome"] != "passed" for row in rows))


def run(check: Check, log: Path, seconds: float, out: Path, scratch: Path) -> str:
    """Runs one check with output to ``log``; "passed", "failed (code)" or "stopped after …"."""
    words = check.command.format(out=out, scratch=scratch).split()
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    settings = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **dict(check.environment)}
    with log.open("w", encoding="utf-8") as stream:
        try:
            code = subprocess.run(
                [sys.executable, *words],
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=root,
                env={**os.environ, **settings},
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    return f"failed ({code})" if code else "passed"


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(check.name for check in CHECKS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/gpu", help="folder for logs and JSON")
    parser.add_argument("--scratch", default="", help="folder for caches; default: inside --out")
    parser.add_argument("--seconds", type=float, default=540, help="total time limit")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[], help=f"some of {names}"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
