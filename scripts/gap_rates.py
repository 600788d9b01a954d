"""What gaps trade: scores and truth over ``warm.gap_rate``, as a table and a picture.

Command:  python scripts/gap_rates.py runs/gaps_00 runs/gaps_10 --svg=docs/gap_rates.svg
Time:     seconds.

Each run is a warm start on words with its own gap rate, measured before by
``python scripts/compare_joint.py --run=<run> --seeds=1 --variants="supervised,straight-through"``.
Runs of one rate are averaged (seeds of training). *Left out*: the share of the context words asked
for (``target.context_words``) that greedy texts do not name. The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compare_joint import CONTROL, START, scores
from conlens_jax.checkpoint_flags import recorded_config
from conlens_jax.measurement.bootstrap import DocumentBootstrap

STAGES = {START: "warm start", CONTROL: "control", "straight-through": "joint"}
COLUMNS = {
    "fve_nrm": "fve_nrm",
    "kl_frac_mean": "kl_frac",
    "sampled_fve_nrm": "sampled fve_nrm",
    "sampled_kl_frac_mean": "sampled kl_frac",
    "left_out": "left out",
    "context_words_right": "right, of those named",
}
Found = dict[tuple[float, str], dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> Found:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--svg", default="", help="also draw them, into this file")
    options = parser.parse_args(arguments)
    found = read(options.runs, options.split)
    print("| gap rate | | " + " | ".join(COLUMNS.values()) + " |")
    print("|---|---|" + "---|" * len(COLUMNS))
    for (rate, stage), values in found.items():
        cells = [f"{values[name]:.3f}" for name in COLUMNS]
        print("| " + " | ".join([f"{rate:g}", STAGES[stage], *cells]) + " |")
    if options.svg:
        draw(found, Path(options.svg))
    return found


def read(runs: Sequence[Path], split: str) -> Found:
    """(gap rate, stage) → the mean of each score over the runs."""
    each: dict[tuple[float, str], list[dict[str, float]]] = defaultdict(list)
    for run in runs:
        config = recorded_config(str(run))
        for file in sorted((run / f"compare_{split}").glob("*.npz")):
            with np.load(file) as record:
                if (stage := str(record["variant"])) in STAGES:
                    key = config.warm.gap_rate, stage
                    values = scores_of(record)
                    said = values["context_words_said"] / config.target.context_words
                    each[key].append({**values, "left_out": 1 - said})
    if not each:
        raise SystemExit(f"no run has a folder compare_{split} of compare_joint.py")
    ordered = sorted(each, key=lambda key: (key[0], list(STAGES).index(key[1])))
    return {
        key: {name: float(np.mean([values[name] for values in each[key]])) for name in COLUMNS}
        for key in ordered
    }


def scores_of(record: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Every score of compare_joint.py, over all documents."""
    rows = {name[4:]: record[name] for name in record if name.startswith("row:")}
    # The first set is of all documents, once; at least one more is drawn.
    means = DocumentBootstrap.draw(record["documents_N"], 1, 0).means(rows)
    return {
        name: float(np.asarray(statistic(means))[0])
        for name, statistic in scores(rows, float(record["resultant"])).items()
    }


def draw(found: Found, file: Path) -> None:
    """Scores over the share that is left out: what it costs, and what it gains."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same file from the same numbers; letters stay letters.
    matplotlib.rcParams |= {"svg.hashsalt": "gap rates", "svg.fonttype": "none"}
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for axis, names, title in (
        (axes[0], {"fve_nrm": "-", "sampled_fve_nrm": "--"}, "fve_nrm"),
        (axes[1], {"context_words_right": "-"}, "context words right, of those named"),
    ):
        for stage, colour in zip(STAGES, ("#8a8a8a", "#0072b2", "#d55e00"), strict=True):
            points = [values for (_, at), values in found.items() if at == stage]
            for name, line in names.items():
                label = STAGES[stage] + (", sampled" if line == "--" else "")
                x, y = ([point[n] for point in points] for n in ("left_out", name))
                axis.plot(x, y, line, color=colour, marker="o", markersize=4, label=label)
        axis.set(xlabel="share of context words left out", title=title)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    lines = axes[0].get_legend_handles_labels()
    axes[1].legend(*lines, fontsize=8, frameon=False, loc="upper left", handlelength=3.2)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
