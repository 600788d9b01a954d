"""Compares joint stages from one warm start, with the same CPU-seconds and several seeds.

Command:  python scripts/compare_joint.py --run=runs/quickstart --seeds=3
Time:     on 2 CPU cores about a minute per variant and seed, at the default budget.

Every variant starts from the run's warm start and trains until the budget is spent (CPU-seconds of
the process on a CPU, wall-clock seconds elsewhere; without compilation). The seed changes the rows
and the noise. The row ``supervised`` is the matched-compute control: the warm start's objective.
It prints the mean over seeds ± half of the 95 % t-interval, on the run's held-out rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conlens_jax.checkpoint_flags import recorded_config
from conlens_jax.config import with_changes
from conlens_jax.data.batches import grouped_batch, prefetch, read_groups
from conlens_jax.data.device_batches import make_batch
from conlens_jax.lens.spec import init_lens, make_spec
from conlens_jax.measurement import metrics
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.host import keep_freed_memory
from conlens_jax.parallel.mesh import batch_sharding
from conlens_jax.tracking.console import Console
from conlens_jax.training.checkpoint import read_metadata
from conlens_jax.training.run import placed
from conlens_jax.training.run_folder import load_lens
from conlens_jax.training.session import Session, make_objective, open_session
from conlens_jax.training.state import Stage, init_state, make_step, stage_optimizer

TIMED_STEPS = 16
T_975 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)  # quantiles of Student's t, by n − 1
SCORES = ("fve_nrm", "kl_frac", "sampled_fve_nrm", "sampled_kl_frac", "nll_text")


def _rate(value: float) -> dict[str, float]:
    name = "joint.optimizer.learning_rate"
    return {f"{name}.start": value, f"{name}.end": value / 10}


# E is trained on D's own text; D continues with the warm start's objective.
_ON_POLICY = {
    "lens.estimator": "detached",
    "loss.entropy.start": 0.0,
    "loss.lm.start": 0.0,  # it would need passes of D and of the warm decoder over D's text
    "loss.kl.start": 0.0,
    "loss.mse.start": 1.0,
    **_rate(1e-3),
}
_RLOO = {
    "lens.estimator": "rloo",
    "lens.estimator_samples": 4,
    "joint.batch_size": 16,
    "loss.entropy.start": 0.0,
}
_FAST = {**_rate(5e-4), "loss.entropy.start": -1.0, "loss.kl.start": 1.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "straight-through": {},
    "st, tau 1": {"loss.tau.start": 1.0},
    "st, no anchor": {"loss.text.start": 0.0},
    "st, KL to warm": {"loss.lm.start": 0.1, "loss.text.start": 0.0},
    "st, sharper": {
        **_rate(3e-4),
        "loss.entropy.start": -1.0,
        "loss.kl.start": 1.0,
        "loss.mse.start": 10.0,
        "loss.text.start": 2.0,
    },
    "st, fast": _FAST,
    "st, fast, cheap": {
        **_FAST,
        "joint.rows_per_document": 2,
        "lens.history_gradient": "detached",
        "loss.text_read": False,
    },
    "reinmax": {"lens.estimator": "reinmax", "loss.tau.start": 1.0},
    "gumbel-rao 4": {
        "lens.estimator": "gumbel_rao",
        "lens.estimator_samples": 4,
        "loss.tau.start": 1.0,
    },
    "rloo 4": _RLOO,
    "rloo 4, no anchor": {**_RLOO, "loss.text.start": 0.0},
    "rloo 4, KL to warm": {**_RLOO, "loss.text.start": 0.0, "loss.lm.start": 0.1},
    "rloo 4, fast": {**_RLOO, **_rate(5e-4)},
    "grpo 4": {**_RLOO, "lens.estimator": "grpo"},
    "E on D's text": _ON_POLICY,
    "E on D's text, cooler": {**_ON_POLICY, "loss.sample_tau.start": 0.5},
    "E on D's text alone": {**_ON_POLICY, "loss.text_read": False},
    "E on D's text alone, kl": {
        **_ON_POLICY,
        "loss.text_read": False,
        "loss.kl.start": 0.1,
        "joint.rows_per_document": 2,
    },
    "rloo 2, cheap": {
        **_ON_POLICY,
        "lens.estimator": "rloo",
        "lens.estimator_samples": 2,
        "loss.text_read": False,
        "loss.mse.start": 2.0,
        "joint.batch_size": 32,
    },
    "E on D's text, kl": {**_ON_POLICY, "loss.kl.start": 0.5},
    "st, warm rate": {**_rate(1e-3), "loss.entropy.start": 0.0},
    "st, warm rate, cooler": {
        **_rate(1e-3),
        "loss.entropy.start": 0.0,
        "loss.kl.start": 0.0,
        "loss.sample_tau.start": 0.5,
    },
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Inputs shared by all variants."""

    session: Session
    caches: tuple[Any, Any]
    start: Params
    frozen: Params
    mean_D: np.ndarray
    resultant: float

    @staticmethod
    def open(run: Path) -> Bench:
        session = open_session(recorded_config(str(run)), Console(), run=run)
        caches, reference = session.caches, session.reference
        template, frozen = init_lens(
            session.model.params, session.spec, reference.mean_D, reference.scale
        )
        start = load_lens(run, placed(template, session), session.config.warm.steps)
        frozen = {**frozen, "warm_decoder": start["decoder"]}
        return Bench(session, caches, start, frozen, reference.mean_D, reference.resultant)

    def scores(self, trainable: Params) -> dict[str, float]:
        rows = self.caches[1].rows(np.arange(len(self.caches[1])))
        measurer, original = self.session.measurer(), self.frozen["original"]
        explained = measurer.explain(trainable, self.frozen, rows)
        mean_ND = np.broadcast_to(self.mean_D, rows.activations_ND.shape)
        effects = measurer.effects(
            original, rows, {**explained.reconstructions, "mean": np.array(mean_ND)}
        )
        found = {}
        for name, prefix in (("greedy", ""), ("sampled", "sampled_")):
            cos = metrics.cosine(explained.reconstructions[name], rows.activations_ND)
            found[prefix + "fve_nrm"] = metrics.fve_nrm(cos, self.resultant)
            found[prefix + "kl_frac"] = metrics.kl_frac(effects[name].kl_at, effects["mean"].kl_at)
        found["nll_text"] = float(measurer.text_nll(original, explained.texts["greedy"]).mean())
        return {name: float(value) for name, value in found.items()}


def train(bench: Bench, name: str, changes: dict[str, Any], budget: float, seeds: int):
    """Yields the scores of each seed after ``budget`` seconds of the variant."""
    config = with_changes(bench.session.config, changes)
    model = bench.session.model
    spec = make_spec(model.config, config.model.layer, config.lens, model.tokenizer)
    objective = make_objective(config, spec, model.tokenizer)
    supervised = name == "supervised"
    batch_size = (config.warm if supervised else config.joint).batch_size
    optimizer_config = config.control.optimizer if supervised else config.joint.optimizer
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    sharding = batch_sharding(bench.session.mesh)
    shared = 1 if supervised else config.joint.rows_per_document
    groups_nk = read_groups(bench.caches[0], shared)
    n_rows = groups_nk.size

    def compiled(steps: int):
        stage = Stage("control" if supervised else "joint", steps, batch_size, optimizer_config)
        optimizer = stage_optimizer(stage, bench.start, n_rows)
        # The step donates its state; the initial state is needed again.
        state = init_state(jax.tree.map(jnp.copy, bench.start), optimizer)
        step = make_step(stage, objective, optimizer, seed=config.train.seed, n_rows=n_rows)
        return step.lower(state, bench.frozen, read(0, 0)).compile(), optimizer

    def read(seed: int, index: int):
        rows = bench.caches[0].rows(grouped_batch(groups_nk, batch_size, 1 + seed, index))
        first = 1_000_000 * (1 + seed)
        return make_batch(rows, sharding, batch_size, first, rows_per_document=shared)

    def run(step, optimizer, steps: int, seed: int):
        state = init_state(jax.tree.map(jnp.copy, bench.start), optimizer)
        for _, batch in prefetch(lambda index: read(seed, index), range(steps)):
            state, _ = step(state, bench.frozen, batch)
        return jax.block_until_ready(state.params)

    step, optimizer = compiled(100)
    run(step, optimizer, 1, 0)
    started = clock()
    run(step, optimizer, TIMED_STEPS, 0)
    seconds = (clock() - started) / TIMED_STEPS
    steps = max(round(budget / seconds), 1)
    step, optimizer = compiled(steps)
    for seed in range(seeds):
        yield {"steps": steps, **bench.scores(run(step, optimizer, steps, seed))}


def summary(values: list[float]) -> str:
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return f"{mean:.3f}"
    half = T_975[min(n - 1, len(T_975) - 1)] * float(np.std(values, ddof=1)) / math.sqrt(n)
    return f"{mean:.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/quickstart", help="run folder with a warm start")
    parser.add_argument(
        "--budget", type=float, default=0, help="seconds; 0: that of the joint stage"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS).replace(", ", "; "))
    parser.add_argument("--set", nargs="*", default=[], metavar="field=number")
    parser.add_argument("--out", default="", help="JSON-lines file, one line per variant and seed")
    arguments = parser.parse_args()
    keep_freed_memory()
    run = Path(arguments.run)
    bench = Bench.open(run)
    warm, joint = bench.session.config.warm.steps, bench.session.config.joint.steps
    budget = arguments.budget
    budget = budget or read_metadata(run / "checkpoints", warm + joint)["train_seconds"]
    common = {name: float(value) for name, value in (item.split("=") for item in arguments.set)}
    print(f"budget {budget:.0f} s per run\n\n| variant | steps | " + " | ".join(SCORES) + " |")
    print("|---|---|" + "---|" * len(SCORES))
    at_start = bench.scores(bench.start)
    print("| warm start | | " + " | ".join(f"{at_start[name]:.3f}" for name in SCORES) + " |")
    for name in (item.replace("; ", ", ") for item in arguments.variants.split(",")):
        results = []
        for seed, result in enumerate(
            train(bench, name, {**common, **VARIANTS[name]}, budget, arguments.seeds)
        ):
            results.append(result)
            if arguments.out:
                with Path(arguments.out).open("a", encoding="utf-8") as file:
                    record = {"variant": name, "seed": seed, **common, **result}
                    file.write(json.dumps(record) + "\n")
        columns = [summary([result[score] for result in results]) for score in SCORES]
        print(f"| {name} | {results[0]['steps']} | " + " | ".join(columns) + " |", flush=True)


if __name__ == "__main__":
    main()
