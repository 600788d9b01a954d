"""Cost of faults: kills, full disks, damaged shards, no network. How often, and what was lost.

Command:  python scripts/fault_trials.py --folder=/tmp/faults
          --only=kill,term (of kill, term, disk, shard, wandb, processes), --kills=100, --seed=0
Time:     about half an hour on 2 CPU cores, most of it the 100 kills.

Every trial runs the real commands on a tiny config and a freshly trained model, with a fault at a
moment chosen by the seed, and then again without a fault. Counted are: trials; *lost*: more was
repeated than since the second-to-last save (a save still being written in the background does not
count), or a listed checkpoint cannot be read; *stuck*: the same command did not finish afterwards;
*other bits*: losses, arrays of the last checkpoints, caches or metrics.json differ from those of an
undisturbed run; *unclear*: it ended with a traceback, a crash, or without naming the cause. Exit
code 1 if any of these is not 0. ``results.json`` in the folder has them too, with a line for each
failed trial.

A full disk is a tmpfs of 48 MB, mounted for the trial (root); without root it is a limit on file
sizes, which fails in the same places with another message.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conlens_jax import launch
from conlens_jax.data.cache_writer import PROGRESS_FILE
from conlens_jax.files.whole import write_whole
from conlens_jax.parallel.preemption import PREEMPTED
from conlens_jax.training.checkpoint import all_steps
from fault_child import FILLER
from fault_world import (
    LIMIT_SECONDS,
    ROWS_PER_SHARD,
    SAVE_EVERY,
    STAGES,
    Ended,
    World,
    differences,
    losses,
    run_command,
    unreadable_checkpoints,
)

SMALL_DISK = "48m"


@dataclasses.dataclass
class Row:
    """A row of the table; ``problems`` lists what went wrong in each trial."""

    fault: str
    trials: int = 0
    lost: int = 0
    stuck: int = 0
    other_bits: int = 0
    unclear: int = 0
    most_repeated: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)

    def count(self, what: str, trial: str, problem: str) -> None:
        setattr(self, what, getattr(self, what) + 1)
        self.problems.append(f"{trial}: {what}: {problem}")

    @property
    def bad(self) -> int:
        return self.lost + self.stuck + self.other_bits + self.unclear


class Trials:
    def __init__(self, world: World, seed: int):
        self.world, self.rng, self.rows = world, random.Random(seed), {}

    def row(self, fault: str) -> Row:
        """The row of a fault; the results so far are saved, since all trials take long."""
        self.write()
        return self.rows.setdefault(fault, Row(fault))

    def write(self) -> None:
        results = [dataclasses.asdict(row) for row in self.rows.values()]
        write_whole(self.world.root / "results.json", json.dumps(results, indent=1) + "\n")

    def finish(self, row: Row, trial: str, folder: Path, stage: str, *more: str) -> None:
        """Runs the command again without a fault, and compares the results."""
        ended = self.world.run(stage, folder, None, *more)
        if ended.code:
            row.count("stuck", trial, f"exit code {ended.code}: {ended.printed[-500:]}")
            return
        stages = STAGES if stage == "quickstart" else (stage,)
        for problem in differences(folder, self.world.whole, stages)[:1]:
            row.count("other_bits", trial, problem)

    # --- SIGKILL ---------------------------------------------------------------------------------

    def kills(self, count: int) -> None:
        """Two of ten in a dump, six in the training, two in an evaluation. A run is killed up to
        four times before it may finish."""
        shares = {"dump": count // 5, "evaluate": count // 5}
        shares["train"] = count - sum(shares.values())
        for stage, wanted in shares.items():
            struck = 0
            while struck < wanted:
                folder, trial = self.world.begin(f"kill-{stage}", stage), f"{stage} kill {struck}"
                killed: Row | None = None
                for _ in range(min(4, wanted - struck)):
                    fault = self._kill(stage)
                    ended = self.world.run(stage, folder, fault)
                    if ended.code == 0:
                        break
                    struck += 1
                    killed = self._after_kill(stage, folder, f"{trial} {fault}", ended)
                if killed is not None:
                    self.finish(killed, trial, folder, stage)

    def _kill(self, stage: str) -> dict[str, Any]:
        """Three of four within 20 ms of a file operation, so during saves; the others at any
        time."""
        if self.rng.random() < 0.75:
            delay = self.rng.choice([0.0, self.rng.uniform(0, 0.02)])
            event = self.rng.randint(1, self.world.events[stage])
            return {"kind": "kill", "event": event, "delay": delay}
        return {"kind": "kill", "after": self.rng.uniform(0, self.world.seconds[stage])}

    def _after_kill(self, stage: str, folder: Path, trial: str, ended: Ended) -> Row:
        where, repeated, allowed = stage, 0, 0
        if stage == "dump":
            repeated, allowed = _rows_repeated(folder), ROWS_PER_SHARD
        elif stage == "train":
            where, repeated = _steps_repeated(folder)
            allowed = 2 * SAVE_EVERY
        row = self.row(f"SIGKILL in {where}")
        row.trials += 1
        row.most_repeated = max(row.most_repeated, repeated)
        if ended.code != -signal.SIGKILL:
            row.count("stuck", trial, f"exit code {ended.code}: {ended.printed[-500:]}")
        if repeated > allowed:
            row.count("lost", trial, f"{repeated} steps or rows of {allowed}")
        for problem in unreadable_checkpoints(folder):
            row.count("lost", trial, problem)
        return row

    # --- SIGTERM ---------------------------------------------------------------------------------

    def terms(self, count: int) -> None:
        """During one quickstart, at any file operation: between the stages too."""
        row, total = self.row("SIGTERM in a quickstart"), sum(self.world.events.values())
        # The first and last operations of a stage are few, so they are chosen explicitly.
        named = [
            "*/cache/validation.partial",
            "*/run/config.json*",
            "*/run/checkpoints/24*",
            "*/run/control",
        ]
        for number in range(count):
            fault = {"kind": "term", "event": self.rng.randint(1, total)}
            if number < len(named):
                fault = {"kind": "term", "match": named[number]}
            folder, trial = self.world.begin("term", "quickstart"), f"term {fault}"
            row.trials += 1
            ended = self.world.run("quickstart", folder, fault)
            if ended.code != PREEMPTED or not ended.is_clear:
                row.count("unclear", trial, f"exit code {ended.code}: {ended.printed[-500:]}")
            self.finish(row, trial, folder, "quickstart")

    # --- full disk -------------------------------------------------------------------------------

    def disks(self) -> None:
        """Each writer once, when it opens its file."""
        for name, stage, match, details, names in (
            ("cache shard", "dump", "*/shard-00002*.tmp", {}, "shard-00002"),
            ("dump's progress", "dump", "*/progress.json.tmp", {"nth": 3}, "progress.json"),
            ("cache metadata", "dump", "*/metadata.json.tmp", {}, "metadata.json"),
            ("run's config.json", "train", "*/run/config.json*", {}, "config.json"),
            ("checkpoint", "train", "*/checkpoints/8.orbax*", {}, "checkpoints/4"),
            ("metrics.jsonl", "train", "*/run/metrics.jsonl", {"page_left": 250}, "metrics.jsonl"),
            ("samples.jsonl", "train", "*/run/samples.jsonl", {"page_left": 700}, "could not be"),
            ("histograms.jsonl", "train", "*/run/histograms.jsonl", {"nth": 4}, "could not be"),
            ("metrics.json", "evaluate", "*/run/metrics.json*", {}, "metrics.json"),
            ("report.html", "evaluate", "*report.html*", {}, "report.html"),
        ):
            row = self.row(f"full disk: {name}")
            with SmallDisk(self.world.root) as (disk, kind):
                folder = self.world.begin("disk", stage, disk / "trial")
                fault = {"kind": kind, "match": match, "path": str(disk), **details}
                row.trials += 1
                ended = self.world.run(stage, folder, fault)
                if not ended.code or not ended.is_clear or names not in ended.printed:
                    row.count("unclear", name, f"code {ended.code}: {ended.printed[-800:]}")
                for problem in unreadable_checkpoints(folder):
                    row.count("lost", name, problem)
                (disk / FILLER).unlink(missing_ok=True)
                self.finish(row, name, folder, stage)
        self._disk_of_programs()
        self._disk_of_a_saved_lens()

    def _disk_of_programs(self) -> None:
        """Programs that cannot be cached are compiled again: nothing stops."""
        row = self.row("full disk: compile cache")
        with SmallDisk(self.world.root) as (disk, kind):
            folder = self.world.begin("disk", "dump")
            kept = {"JAX_COMPILATION_CACHE_DIR": str(disk / "compiled")}
            fault = {"kind": kind, "match": "*-cache", "root": str(disk), "path": str(disk)}
            if kind != "fill":
                return  # a limit on file sizes would affect the dump as well
            row.trials += 1
            ended = self.world.run("dump", folder, fault, **kept)
            (disk / FILLER).unlink(missing_ok=True)
            # With train.compile_cache truncated files are removed; the environment variable is
            # JAX's.
            more = f"--config.train.compile_cache={disk / 'compiled'}"
            again = self.world.run("dump", self.world.begin("disk", "dump"), None, more)
            for one in (ended, again):
                if one.code or "Traceback" in one.printed:
                    row.count("unclear", "programs", f"code {one.code}: {one.printed[-800:]}")
            if "Error reading persistent" in again.printed:
                row.count("unclear", "programs", f"truncated programs stay: {again.printed[-800:]}")
            for problem in differences(folder, self.world.whole, ("dump",)):
                row.count("other_bits", "programs", problem)

    def _disk_of_a_saved_lens(self) -> None:
        """A lens saved over an older one: the old one stays complete."""
        row = self.row("full disk: saved lens")
        with SmallDisk(self.world.root) as (disk, kind):
            self._save_lens(disk / "new", disk, {"kind": "none"}, 1.0)
            after = _contents(disk / "new")
            self._save_lens(disk / "lens", disk, {"kind": "none"}, 0.0)
            before = _contents(disk / "lens")
            for match in ("*lens/*decoder*", "*lens/*encoder*", "*lens/*config.json*"):
                row.trials += 1
                fault = {"kind": kind, "match": match, "path": str(disk)}
                ended = self._save_lens(disk / "lens", disk, fault, 1.0)
                (disk / FILLER).unlink(missing_ok=True)
                found = _contents(disk / "lens")
                if found != (before if ended.code else after):
                    row.count("lost", match, "neither the old lens nor the new one exists")
                if not ended.code or not ended.is_clear:
                    row.count("unclear", match, f"code {ended.code}: {ended.printed[-800:]}")

    def _save_lens(self, lens: Path, root: Path, fault: dict[str, Any], add: float) -> Ended:
        fault = {"root": str(root), **fault}
        arguments = ["fault_save_lens", str(self.world.whole / "run"), str(lens), str(add)]
        command = [sys.executable, "-m", "fault_child", json.dumps(fault), *arguments]
        return run_command(command, self.world.environment())

    # --- shards ----------------------------------------------------------------------------------

    def shards(self) -> None:
        """A shard that is truncated or altered in place while training reads it."""
        for kind in ("cut", "alter"):
            row = self.row(f"shard {kind} while training")
            for match in ("*/run/metrics.jsonl", "*/checkpoints/28.orbax*"):
                folder, trial = self.world.begin("shard", "train"), f"{kind} {match}"
                shard = folder / "cache" / "train" / "shard-00001.safetensors"
                whole = shard.read_bytes()
                fault = {"kind": kind, "match": match, "nth": 2, "path": str(shard)}
                row.trials += 1
                ended = self.world.run("train", folder, fault)
                if not ended.code or not ended.is_clear or shard.name not in ended.printed:
                    row.count("unclear", trial, f"code {ended.code}: {ended.printed[-500:]}")
                shard.write_bytes(whole)
                self.finish(row, trial, folder, "train")

    # --- W&B -------------------------------------------------------------------------------------

    def wandb(self) -> None:
        """Offline, and online without a network; killed and resumed; training is the same."""
        offline = {"WANDB_MODE": "offline"}
        online = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40}
        for name, environment in (
            ("offline", offline),
            ("online, refused", {**online, "WANDB_BASE_URL": "http://127.0.0.1:9"}),
            ("online, silent", {**online, "WANDB_BASE_URL": "http://10.255.255.1"}),
        ):
            row = self.row(f"W&B {name}")
            row.trials += 1
            folder = self.world.begin("wandb", "train")
            fault = {"kind": "kill", "match": "*/checkpoints/28.orbax*"}
            self.world.run("train", folder, fault, **environment)
            ended = self.world.run("train", folder, None, **environment)
            if ended.code:
                row.count("stuck", name, f"code {ended.code}: {ended.printed[-800:]}")
                continue
            over = round(ended.seconds - self.world.seconds["train"])
            row.most_repeated = max(row.most_repeated, over)
            for problem in differences(folder, self.world.whole, ("train",)):
                row.count("other_bits", name, problem)

    # --- several processes -----------------------------------------------------------------------

    def processes(self) -> None:
        """Two processes, one of them killed or asked to stop; then two that finish. The undisturbed
        run also has two processes, since sums over two devices differ."""
        whole = self.world.root / "whole-of-two"
        shutil.rmtree(whole, ignore_errors=True)
        codes, printed, _ = self._two(whole, None)
        if any(codes):
            raise RuntimeError(f"two undisturbed processes ended with {codes}:\n{printed}")
        for kind, match, struck in (
            ("kill", "*/cache/train.partial/shard-00003*", 0),
            ("kill", "*/run/checkpoints/12.orbax*", 0),
            ("kill", "", 1),
            ("term", "*/run/config.json*", 0),
            ("term", "*/run/checkpoints/24.orbax*", 0),
            ("term", "", 1),
        ):
            row = self.row(f"two processes, one {'killed' if kind == 'kill' else 'SIGTERM'}")
            row.trials += 1
            fault = {"kind": kind, "match": match} if match else {"kind": kind, "after": 12.0}
            folder = self.world.begin("two", "quickstart")
            trial = f"process {struck}: {fault}"
            codes, printed, seconds = self._two(folder, fault, struck)
            if kind == "term" and set(codes) != {PREEMPTED}:
                row.count("unclear", trial, f"codes {codes}: {printed[-800:]}")
            if 0 in codes and kind == "kill":
                row.count("unclear", trial, f"codes {codes}: {printed[-800:]}")
            codes, printed, _ = self._two(folder, None)
            if any(codes):
                row.count("stuck", trial, f"codes {codes}: {printed[-800:]}")
                continue
            for problem in differences(folder, whole)[:1]:
                row.count("other_bits", trial, problem)

    def _two(
        self, folder: Path, fault: dict[str, Any] | None, struck: int = 0
    ) -> tuple[list[int], str, float]:
        """A quickstart of two processes of one device: exit codes, what was printed, seconds."""
        folder.mkdir(parents=True, exist_ok=True)
        said, started = folder / "said.txt", time.monotonic()
        more = ["--config.distributed.timeout=15", "--config.mesh.data=2"]
        shared = self.world.arguments("quickstart", folder, *more)
        both = json.dumps({"kind": "none", "root": str(folder), "process": struck, **(fault or {})})
        before = dict(os.environ)
        os.environ.update(self.world.environment())
        try:
            with said.open("wb") as stream:
                running = launch.start(
                    ["fault_child", both, *shared], 2, 1, stdout=stream, stderr=stream
                )
            try:
                launch.wait(running, grace=60)
            finally:
                for process in running:
                    process.kill()
        finally:
            os.environ.clear()
            os.environ.update(before)
        codes = [process.wait() for process in running]
        return codes, said.read_text(errors="replace"), time.monotonic() - started


class SmallDisk:
    """A small file system for a trial, to be filled, or with limited file sizes."""

    def __init__(self, root: Path):
        self.folder = root / "small"

    def __enter__(self) -> tuple[Path, str]:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        options = ["-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(self.folder)]
        self.mounted = os.geteuid() == 0 and not subprocess.call(
            ["mount", *options], stderr=subprocess.DEVNULL
        )
        return self.folder, "fill" if self.mounted else "small files"

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            subprocess.check_call(["umount", "-l", str(self.folder)])


def _contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _rows_repeated(folder: Path) -> int:
    """Rows in shard files that a resumed dump writes again."""
    repeated = 0
    for partial in (folder / "cache").glob("*.partial"):
        progress = partial / PROGRESS_FILE
        safe = json.loads(progress.read_text())["metadata"]["n_rows"] if progress.exists() else 0
        repeated += len(list(partial.glob("*.safetensors"))) * ROWS_PER_SHARD - safe
    return repeated


def _steps_repeated(folder: Path) -> tuple[str, int]:
    """The stage that was killed, and how many of its logged steps a resumed run repeats."""
    for part in ("run/control", "run"):
        logged = [dict(record) for record in losses(folder / part)]
        steps = [record for record in logged if "loss" in record]
        if steps:
            first = {"control": 24}.get(steps[-1]["stage"], 0)
            newest = max([first, *all_steps(folder / part / "checkpoints")])
            return steps[-1]["stage"], max(steps[-1]["step"] - newest, 0)
    return "the start of training", 0


def table(rows: list[Row]) -> str:
    names = ["fault", "trials", "lost", "stuck", "other bits", "unclear", "most done again"]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        counts = (row.trials, row.lost, row.stuck, row.other_bits, row.unclear, row.most_repeated)
        lines.append([row.fault, *map(str, counts)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/fault_trials"))
    parser.add_argument("--only", default="kill,term,disk,shard,wandb,processes")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unmounts the file system
    world = World(flags.folder)
    trials = Trials(world, flags.seed)
    kinds: dict[str, Callable[[], None]] = {
        "kill": lambda: trials.kills(flags.kills),
        "term": lambda: trials.terms(flags.terms),
        "disk": trials.disks,
        "shard": trials.shards,
        "wandb": trials.wandb,
        "processes": trials.processes,
    }
    chosen = flags.only.split(",")
    if unknown := set(chosen) - kinds.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))}; known faults are {', '.join(kinds)}")
    print(f"one undisturbed run; a command that runs for {LIMIT_SECONDS} s counts as stuck")
    world.make_whole()
    for kind in chosen:
        kinds[kind]()
        trials.write()
        print(f"{kind}: done", flush=True)
    print(table(list(trials.rows.values())))
    for row in trials.rows.values():
        for problem in row.problems:
            print(f"\n{row.fault}: {problem}")
    return int(any(row.bad for row in trials.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
