"""Compares joint stages from one warm start, with the same CPU-seconds and several seeds.

Command:  python scripts/compare_joint.py --run=runs/quickstart --seeds=3
          python scripts/compare_joint.py --run=runs/quickstart --finished --split=test
          python scripts/compare_joint.py --show=folder_a,folder_b
Time:     on 2 CPU cores about a minute per variant and seed, at the default budget.

Every variant starts from the run's warm start and trains until the budget is spent (CPU-seconds of
the process on a CPU, wall-clock seconds elsewhere; without compilation). The seed changes the rows
and the noise. The row ``supervised`` is the matched-compute control: the warm start's objective.

It prints the mean over the seeds, and the difference from the control, paired by held-out row, with
a 95 % bootstrap interval over documents of its mean over the seeds. What was measured is kept in
``--out``: a command that was interrupted goes on, and ``--show`` takes several folders together
(warm starts with other seeds, on the same held-out rows). ``--split=test`` measures on rows that no
choice was made on (dump.n_test_samples); ``--finished`` measures the run's own joint stage and
control there, and trains nothing.

Where several processes share a GPU, measure first what a step costs, one process at a time:
``--costs=folder --only_costs``, then train with ``--costs=folder``.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import io
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conlens_jax.checkpoint_flags import recorded_config
from conlens_jax.config import with_changes
from conlens_jax.data.batches import grouped_batch, prefetch, read_groups
from conlens_jax.data.device_batches import make_batch
from conlens_jax.evaluation.studies.said_words import SaidWords
from conlens_jax.evaluation.suite import PerRow, Suite
from conlens_jax.files.whole import write_atomically, write_whole
from conlens_jax.lens.spec import init_lens, make_spec
from conlens_jax.measurement.aggregates import mean_of, reconstruction_statistics
from conlens_jax.measurement.bootstrap import (
    DocumentBootstrap,
    Interval,
    Statistic,
    percentile_interval,
)
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.host import keep_freed_memory
from conlens_jax.parallel.mesh import batch_sharding
from conlens_jax.tracking.console import Console
from conlens_jax.training.checkpoint import all_steps, read_metadata
from conlens_jax.training.run import placed
from conlens_jax.training.run_folder import CONTROL as CONTROL_FOLDER
from conlens_jax.training.run_folder import load_lens
from conlens_jax.training.session import Session, make_objective, open_session
from conlens_jax.training.state import Stage, init_state, make_step, stage_optimizer
from studies.joint_variants import VARIANTS

TIMED_STEPS = 16
CONTROL, START = "supervised", "warm start"
_COMPARED = ("fve_nrm", "kl_frac_mean")
_TRUTH = ("next_words_right", "context_words_said", "context_words_right", "context_words_found")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds a step of each variant.

    Attributes:
      folder: where they are kept; None: nowhere.
    """

    folder: Path | None

    def of(self, name: str, measured: Callable[[], float]) -> float:
        """Measured while no other process of this folder measures, and only once."""
        if self.folder is None:
            return measured()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{_letters(name)}.json"
        if not file.exists():
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                write_whole(file, json.dumps(measured()))
        return json.loads(file.read_text())


@dataclasses.dataclass(frozen=True)
class Bench:
    """Inputs shared by all variants."""

    session: Session
    suite: Suite
    words: SaidWords | None
    start: Params
    frozen: Params

    @staticmethod
    def open(run: Path, split: str, skip: int = 0) -> Bench:
        """``skip``: the number of rows at the beginning of the split to leave out."""
        config = with_changes(recorded_config(str(run)), {"evaluate.split": split})
        session = open_session(config, Console(), run=run)
        config, reference, held_out = session.config, session.reference, session.held_out
        template, frozen = init_lens(
            session.model.params, session.spec, reference.mean_D, reference.scale
        )
        start = load_lens(run, placed(template, session), config.warm.steps)
        frozen = {**frozen, "warm_decoder": start["decoder"]}
        suite = Suite.make(
            session.measurer(),
            held_out.rows(np.arange(skip, len(held_out))),
            reference,
            config.warm,
            frozenset(),
            n_resamples=config.evaluate.bootstrap,
            seed=config.evaluate.seed,
        )
        tokenizer = session.model.tokenizer
        words = None
        if config.target.kind == "words":
            words = SaidWords.of_target(suite, tokenizer, config.target)
        return Bench(session, suite, words, start, frozen)

    def measured(self, trainable: Params) -> PerRow:
        """What the scores are means of, one number per held-out row."""
        suite, original = self.suite, self.frozen["original"]
        rows, measurer = suite.rows, suite.measurer
        explained = measurer.explain(trainable, self.frozen, rows)
        found = explained.reconstructions
        mean_ND = np.broadcast_to(suite.reference.mean_D, rows.activations_ND.shape)
        candidates = {
            **found,
            "null_shuffle": found["greedy"][suite.partner_N],
            "mean": np.array(mean_ND),
        }
        effects = measurer.effects(original, rows, candidates)
        per_row = suite.quantities(candidates, effects)
        per_row["text.nll"] = measurer.text_nll(original, explained.texts["greedy"])
        for name, texts_NT in explained.texts.items():
            per_row |= suite.lengths(texts_NT, name)
        if self.words is not None:
            per_row |= self.words.counts(explained.texts["greedy"], effects["clean"])
            others_NT = explained.texts["greedy"][suite.partner_N]
            per_row |= self.words.counts(others_NT, effects["clean"], "null_shuffle_")
        return per_row

    def facts(self) -> dict[str, np.ndarray]:
        """What is kept beside the rows' numbers, to compare them later."""
        return {
            "documents_N": self.suite.rows.documents_N,
            "resultant": np.float64(self.suite.reference.resultant),
        }


def train(
    bench: Bench,
    name: str,
    changes: Mapping[str, Any],
    costs: Costs,
    budget: float,
    seeds: list[int],
) -> Iterator[tuple[int, int, Params]]:
    """Seed, steps and the lens after ``budget`` seconds of the variant."""
    config = with_changes(bench.session.config, changes)
    model, cache = bench.session.model, bench.session.caches[0]
    spec = make_spec(model.config, config.model.layer, config.lens, model.tokenizer)
    objective = make_objective(config, spec, model.tokenizer)
    supervised = name == CONTROL
    batch_size = (config.warm if supervised else config.joint).batch_size
    optimizer_config = config.control.optimizer if supervised else config.joint.optimizer
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    sharding = batch_sharding(bench.session.mesh)
    shared = 1 if supervised else config.joint.rows_per_document
    groups_nk = read_groups(cache, shared)
    n_rows = groups_nk.size

    def compiled(steps: int):
        stage = Stage("control" if supervised else "joint", steps, batch_size, optimizer_config)
        optimizer = stage_optimizer(stage, bench.start, n_rows)
        # The step donates its state; the initial state is needed again.
        state = init_state(jax.tree.map(jnp.copy, bench.start), optimizer)
        step = make_step(stage, objective, optimizer, seed=0, n_rows=n_rows)
        return step.lower(state, bench.frozen, read(0, 0)).compile(), optimizer

    def read(seed: int, index: int):
        rows = cache.rows(grouped_batch(groups_nk, batch_size, 1 + seed, index))
        first = 1_000_000 * (1 + seed)
        return make_batch(rows, sharding, batch_size, first, rows_per_document=shared)

    def run(step, optimizer, steps: int, seed: int):
        state = init_state(jax.tree.map(jnp.copy, bench.start), optimizer)
        for _, batch in prefetch(lambda index: read(seed, index), range(steps)):
            state, _ = step(state, bench.frozen, batch)
        return jax.block_until_ready(state.params)

    def seconds_per_step() -> float:
        step, optimizer = compiled(100)
        run(step, optimizer, 1, 0)
        started = clock()
        run(step, optimizer, TIMED_STEPS, 0)
        return (clock() - started) / TIMED_STEPS

    steps = max(round(budget / costs.of(name, seconds_per_step)), 1)
    if seeds:
        step, optimizer = compiled(steps)
    for seed in seeds:
        yield seed, steps, run(step, optimizer, steps, seed)


def scores(per_row: Mapping[str, Any], resultant: float) -> dict[str, Statistic]:
    """Each column of the table as a function of named means over rows."""
    statistics: dict[str, Statistic] = {}
    for candidate, prefix in (
        ("greedy", ""),
        ("sampled", "sampled_"),
        ("null_shuffle", "null_shuffle_"),
    ):
        statistics |= reconstruction_statistics(candidate, prefix, resultant, _COMPARED)
    statistics["nll_text"] = mean_of("text.nll")
    if "greedy.tokens" in per_row:
        statistics["tokens"] = mean_of("greedy.tokens")
        statistics["sampled_tokens"] = mean_of("sampled.tokens")
    if "context_said" in per_row:
        of_text = SaidWords.statistics()
        statistics |= {name: of_text[name] for name in _TRUTH}
        name = "null_shuffle_context_words_right"
        statistics[name] = SaidWords.statistics("null_shuffle_")[name]
    return statistics


def show(folders: list[Path]) -> None:
    """Prints the mean over the seeds of each variant, and its difference from the control."""
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)
    for folder in folders:
        for file in sorted(folder.glob("*.npz")):
            with np.load(file) as arrays:
                record = dict(arrays)
            found[str(record["variant"])][str(folder), str(record["seed"])] = record
    first = next(iter(found[START].values()))
    documents_N = first["documents_N"]
    bootstrap = DocumentBootstrap.draw(documents_N, 2000, 0)
    values: dict[str, dict[tuple[str, str], dict[str, np.ndarray]]] = defaultdict(dict)
    for name, runs in found.items():
        for key, record in runs.items():
            if not np.array_equal(record["documents_N"], documents_N):
                raise SystemExit(f"--show: {key[0]} was measured on other rows than {folders[0]}")
            per_row = {k[4:]: v for k, v in record.items() if k.startswith("row:")}
            means = bootstrap.means(per_row)
            statistics = scores(per_row, float(record["resultant"]))
            values[name][key] = {k: np.asarray(f(means)) for k, f in statistics.items()}
    columns = list(next(iter(values[START].values())))
    print("| variant | seeds | steps | " + " | ".join(columns) + " |")
    print("|---|---|---|" + "---|" * len(columns))
    for name, runs in values.items():
        steps = sorted({int(record["steps"]) for record in found[name].values()})
        means = [f"{np.mean([run[c][0] for run in runs.values()]):.3f}" for c in columns]
        cells = [name, str(len(runs)), "–".join(map(str, {steps[0]: 0, steps[-1]: 0})), *means]
        print("| " + " | ".join(cells) + " |")
    columns = [p + c for p in ("", "sampled_") for c in _COMPARED]
    print(f"\n| minus {CONTROL} | seeds | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for name, runs in values.items():
        control = values.get(CONTROL + name[len(name.split(" ×")[0]) :], {})
        shared = [key for key in runs if key in control]
        if not shared or name.startswith(CONTROL):
            continue
        cells = []
        for column in columns:
            by_seed = [runs[key][column] - control[key][column] for key in shared]
            interval = percentile_interval(np.mean(by_seed, axis=0))
            each = ", ".join(f"{difference[0]:+.3f}" for difference in by_seed)
            cells.append(f"{_signed(interval)} ({each})")
        print(f"| {name} | {len(shared)} | " + " | ".join(cells) + " |")


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.lo:+.3f}, {interval.hi:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", default="runs/quickstart", help="run folders with a warm start, by commas"
    )
    parser.add_argument(
        "--budget", type=float, default=0, help="seconds; 0: those of the run's joint stage"
    )
    parser.add_argument("--times", default="1", help="multiples of the budget, such as 1,4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS).replace(", ", "; "))
    parser.add_argument(
        "--finished", action="store_true", help="the run's own joint stage and control"
    )
    parser.add_argument("--split", default="validation", help="validation, test, or both")
    parser.add_argument(
        "--skip", type=int, default=0, help="rows of each split that an earlier choice has seen"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="field=number")
    parser.add_argument("--out", default="", help="folder; empty: that of the run folders")
    parser.add_argument("--costs", default="", help="folder of the seconds a step")
    parser.add_argument("--only_costs", action="store_true", help="measure these alone")
    parser.add_argument("--show", default="", help="only print the tables of these folders")
    arguments = parser.parse_args()
    if arguments.show:
        show([Path(folder) for folder in arguments.show.split(",")])
        return
    keep_freed_memory()
    costs = Costs(Path(arguments.costs) if arguments.costs else None)
    common = {name: float(value) for name, value in (item.split("=") for item in arguments.set)}
    splits = arguments.split.split(",")
    outs = defaultdict(list)
    for run in map(Path, arguments.run.split(",")):
        benches = {split: Bench.open(run, split, arguments.skip) for split in splits}
        folders = {
            split: Path(arguments.out or run.parent) / run.name / f"compare_{split}"
            for split in splits
        }
        for split, folder in folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            outs[split].append(folder)
        _compare(arguments, run, benches, folders, costs, common)
    for split, folders in outs.items():
        if not arguments.only_costs:
            print(f"\n{split}\n")
            show(folders)


def _compare(
    arguments: argparse.Namespace,
    run: Path,
    benches: Mapping[str, Bench],
    folders: Mapping[str, Path],
    costs: Costs,
    common: Mapping[str, float],
) -> None:
    """Trains the variants from one warm start, and keeps what each split measures."""
    bench = next(iter(benches.values()))
    config = bench.session.config

    def keep(name: str, seed: int, steps: int, lens: Params) -> None:
        for split, folder in folders.items():
            if _file(folder, name, seed).exists():
                continue
            per_row = benches[split].measured(lens)
            rows = {f"row:{key}": value for key, value in per_row.items()}
            facts = benches[split].facts()
            record = {"variant": name, "seed": seed, "steps": steps, **facts, **rows}
            contents = io.BytesIO()
            np.savez_compressed(contents, **record)
            write_atomically(_file(folder, name, seed), [contents.getvalue()])

    if not arguments.only_costs:
        for seed in range(1 if arguments.finished else arguments.seeds):
            keep(START, seed, 0, bench.start)
    warm, joint = config.warm.steps, config.joint.steps
    if arguments.finished:
        for name, folder in (("joint stage", run), (CONTROL, run / CONTROL_FOLDER)):
            last = all_steps(folder / "checkpoints")[-1]
            keep(name, 0, last - warm, load_lens(folder, bench.start, last))
        return
    budget = arguments.budget
    budget = budget or read_metadata(run / "checkpoints", warm + joint)["train_seconds"]
    for name in (item.replace("; ", ", ") for item in arguments.variants.split(",")):
        for times in arguments.times.split(","):
            title = name if times == "1" else f"{name} ×{times}"
            missing = lambda seed, title=title: any(
                not _file(folder, title, seed).exists() for folder in folders.values()
            )
            seeds = [] if arguments.only_costs else list(filter(missing, range(arguments.seeds)))
            if not (seeds or arguments.only_costs):
                continue
            changes = {**common, **VARIANTS[name]}
            results = train(bench, name, changes, costs, budget * float(times), seeds)
            for seed, steps, lens in results:
                keep(title, seed, steps, lens)
                print(f"{title}: seed {seed}, {steps} steps", flush=True)


def _letters(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _file(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{_letters(name)}-{seed}.npz"


if __name__ == "__main__":
    main()
