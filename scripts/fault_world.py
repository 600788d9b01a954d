"""A tiny run that takes seconds, its undisturbed result, and comparisons with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from conlens_jax.config import ExperimentConfig, from_config_dict, to_json_dict, with_changes
from conlens_jax.tracking.records import read_metrics
from conlens_jax.training.checkpoint import all_steps

SAVE_EVERY, ROWS_PER_SHARD = 4, 48
STAGES = ("dump", "train", "evaluate")
LIMIT_SECONDS = 240

# Every step is logged, so that runs can be compared step by step; the control has a fixed length,
# since its default, by compute time, varies.
SETTINGS: dict[str, Any] = {
    "model.layer": 1,
    "model.unroll": 1,
    "embedded.d_model": 16,
    "embedded.n_layers": 3,
    "embedded.n_heads": 2,
    "embedded.n_kv_heads": 1,
    "embedded.d_mlp": 32,
    "embedded.vocab_size": 320,
    "embedded.steps": 30,
    "embedded.batch_size": 16,
    "embedded.seq_len": 64,
    "corpus.n_documents": 400,
    "corpus.validation_fraction": 0.2,
    "dump.seq_len": 40,
    "dump.n_samples": 288,
    "dump.n_validation_samples": 64,
    "dump.positions_per_sequence": 2,
    "dump.batch_size": 16,
    "dump.rows_per_shard": ROWS_PER_SHARD,
    "lens.text_len": 4,
    "lens.decoder_prompt": "<embed>",
    "warm.before": 3,
    "warm.after": 1,
    "warm.steps": 24,
    "warm.batch_size": 16,
    "joint.steps": 24,
    "joint.batch_size": 16,
    "control.enabled": True,
    "control.steps": 8,
    "train.log_every": 1,
    "train.validate_every": 8,
    "train.sample_every": 8,
    "train.validation_rows": 16,
    "train.n_verbose_samples": 2,
    "checkpoint.every": SAVE_EVERY,
    "wandb.mode": "disabled",
    "evaluate.rows": 32,
    "evaluate.batch_size": 16,
    "evaluate.bootstrap": 40,
    "evaluate.n_examples": 2,
    "evaluate.kl_horizon": 2,
}
# Compilation dominates a tiny run; every program is compiled once for all trials.
_QUICK = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended, what it printed, and how long it took."""

    code: int
    printed: str
    seconds: float

    @property
    def is_clear(self) -> bool:
        """Whether an error is reported in words, not as a traceback or a crash."""
        return self.code in (1, 2, 75) and "Traceback" not in self.printed


class World:
    """The folder of all trials: one config, one model, one undisturbed run.

    Attributes:
      events, seconds: by stage, the file events and the seconds of the undisturbed command.
    """

    def __init__(self, root: Path):
        self.root = root.absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self.events: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        config = with_changes(
            ExperimentConfig(), {**SETTINGS, "embedded.cache_dir": str(self.root / "models")}
        )
        self.config: ExperimentConfig = from_config_dict(to_json_dict(config))
        self._config_file = self.root / "config.py"
        self._config_file.write_text(
            "import json\n"
            "from conlens_jax.config import from_config_dict, to_config_dict\n"
            f"values = json.loads({json.dumps(to_json_dict(config))!r})\n"
            "get_config = lambda: to_config_dict(from_config_dict(values))\n",
            encoding="utf-8",
        )

    @property
    def whole(self) -> Path:
        """The undisturbed run and its cache."""
        return self.root / "whole"

    def make_whole(self) -> None:
        """Runs the three commands undisturbed, twice: the second time, with compiled programs, is
        measured. Results of an earlier call in the folder are reused."""
        counts = {stage: self.root / f"{stage}.json" for stage in STAGES}
        if all(count.exists() for count in counts.values()):
            self._read_counts(counts)
            return
        for _ in range(2):
            shutil.rmtree(self.whole, ignore_errors=True)
            for stage in STAGES:
                fault = {
                    "kind": "count",
                    "root": str(self.whole),
                    "count_file": str(self.root / f"{stage}.first.json"),
                }
                ended = self.run(stage, self.whole, fault)
                if ended.code:
                    raise RuntimeError(f"the undisturbed {stage} failed:\n{ended.printed}")
        for stage, count in counts.items():
            (self.root / f"{stage}.first.json").rename(count)
        self._read_counts(counts)

    def _read_counts(self, counts: dict[str, Path]) -> None:
        for stage, count in counts.items():
            counted = json.loads(count.read_text())
            self.events[stage], self.seconds[stage] = counted["events"], counted["seconds"]

    def begin(self, name: str, stage: str, folder: Path | None = None) -> Path:
        """A new folder with the results before a stage."""
        folder = folder or self.root / "trials" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if stage in ("train", "evaluate"):
            shutil.copytree(self.whole / "cache", folder / "cache")
        if stage == "evaluate":
            ignored = shutil.ignore_patterns("metrics.json", "metrics.csv", "report.html")
            shutil.copytree(self.whole / "run", folder / "run", ignore=ignored)
        return folder

    def arguments(self, stage: str, folder: Path, *more: str) -> list[str]:
        """Module and flags of a stage (dump, train, evaluate or quickstart)."""
        return [
            f"conlens_jax.{stage}",
            f"--config={self._config_file}",
            f"--config.run_dir={folder / 'run'}",
            f"--config.dump.cache_dir={folder / 'cache'}",
            *more,
        ]

    def environment(self, **more: str) -> dict[str, str]:
        scripts = Path(__file__).parent.absolute()
        path = [str(scripts.parent), str(scripts), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            **_QUICK,
            "JAX_COMPILATION_CACHE_DIR": str(self.root / "compiled"),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            **more,
        }

    def run(
        self,
        stage: str,
        folder: Path,
        fault: dict[str, Any] | None = None,
        *more: str,
        **environment: str,
    ) -> Ended:
        """Runs one command, with a fault of :mod:`fault_child`; killed if it hangs."""
        fault = {"kind": "none", "root": str(folder), **(fault or {})}
        command = [sys.executable, "-m", "fault_child", json.dumps(fault)]
        command += self.arguments(stage, folder, *more)
        return run_command(command, self.environment(**environment))


def run_command(command: list[str], environment: dict[str, str]) -> Ended:
    """Runs to the end, or for ``LIMIT_SECONDS``; then the code is 124."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        printed, _ = process.communicate(timeout=LIMIT_SECONDS)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
        code = 124
    return Ended(code, printed, time.monotonic() - started)


# --- contents of a run ---------------------------------------------------------------------------


def differences(found: Path, expected: Path, stages: tuple[str, ...] = STAGES) -> list[str]:
    """Where the results in two folders of a trial differ; empty if they are equal to the last
    bit."""
    problems = []
    if "dump" in stages and _hashes(found / "cache") != _hashes(expected / "cache"):
        problems.append("the caches differ")
    if "train" in stages:
        for part in ("run", "run/control"):
            if losses(found / part) != losses(expected / part):
                problems.append(f"losses of {part} differ")
            problems += _other_arrays(found / part / "checkpoints", expected / part / "checkpoints")
    if "evaluate" in stages:
        ours, theirs = (folder / "run" / "metrics.json" for folder in (found, expected))
        if not ours.exists() or json.loads(ours.read_text()) != json.loads(theirs.read_text()):
            problems.append("metrics.json differs")
    return problems


def losses(run: Path) -> list[tuple]:
    """The content of ``metrics.jsonl``, without times."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    times = ("time", "train_seconds")
    return [
        tuple((name, value) for name, value in record.items() if name not in times)
        for record in read_metrics(file)
    ]


def unreadable_checkpoints(folder: Path) -> list[str]:
    """The checkpoints listed by :func:`all_steps` that cannot be read."""
    found = []
    for part in (folder / "run", folder / "run/control"):
        for step in all_steps(part / "checkpoints"):
            try:
                arrays(part / "checkpoints", step)
            except Exception as error:  # any error means that it is damaged
                found.append(f"{part.name} {step}: {str(error).splitlines()[0][:120]}")
    return found


def arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name."""
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        tree = checkpointer.restore(
            folder.absolute() / str(step) / "state",
            args=ocp.args.PyTreeRestore(restore_args=_as_numpy(folder / str(step) / "state")),
        )
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _as_numpy(path: Path) -> Any:
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path.absolute()).tree
    handler.close()
    return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)


def _other_arrays(found: Path, expected: Path) -> list[str]:
    if not all_steps(expected):
        return []
    last = all_steps(expected)[-1]
    if last not in all_steps(found):
        return [f"{found} has no step {last}"]
    ours, theirs = arrays(found, last), arrays(expected, last)
    return [
        f"{found}: {name} differs"
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not np.array_equal(ours[name], theirs[name])
    ][:3]


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
