"""What a price on the length of a text, or on its distance from M's own language, trades.

Command:  python scripts/prices.py runs/quickstart runs/seed1 --svg=docs/length_price.svg
          python scripts/prices.py runs/quickstart --of=fluent
Time:     seconds.

Each run is a warm start with an end token, measured before by ``python scripts/compare_joint.py
--run=<run> --variants="supervised,straight-through,st; length 0.5,st; length 0.9"``: joint stages
with ``loss.length`` (or, ``st; fluent …``, with ``loss.lm`` and M's own predictions of the text as
its reference). Runs are averaged (seeds of training). The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compare_joint import CONTROL, START
from gap_rates import scores_of
from studies.joint_variants import FLUENCY_WEIGHTS, LENGTH_PRICES

WITHOUT = "straight-through"
PRICED = {
    "length": {f"st, length {price}": price for price in LENGTH_PRICES},
    "fluent": {f"st, fluent {weight}": weight for weight in FLUENCY_WEIGHTS},
}
COLUMNS = {
    "tokens": "tokens",
    "fve_nrm": "fve_nrm",
    "kl_frac_mean": "kl_frac",
    "sampled_tokens": "sampled tokens",
    "sampled_fve_nrm": "sampled fve_nrm",
    "sampled_kl_frac_mean": "sampled kl_frac",
    "next_words_right": "next words right",
    "context_words_said": "context words said",
    "context_words_right": "right",
    "nll_text": "nll_text",
}
Found = dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> Found:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--of", choices=list(PRICED), default="length")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--svg", default="", help="also draw scores over length, into this file")
    options = parser.parse_args(arguments)
    found = read(options.runs, options.split, options.of)
    print("| | " + " | ".join(COLUMNS.values()) + " |")
    print("|---|" + "---|" * len(COLUMNS))
    for name, values in found.items():
        print("| " + " | ".join([name, *(f"{values[c]:.3f}" for c in COLUMNS)]) + " |")
    if options.svg:
        draw(found, Path(options.svg))
    return found


def read(runs: Sequence[Path], split: str, kind: str) -> Found:
    """Stage, or price of the joint stage → the mean of each score over the runs."""
    titles = {START: START, CONTROL: "control", WITHOUT: "0"}
    titles |= {variant: f"{price:g}" for variant, price in PRICED[kind].items()}
    each = defaultdict(list)
    for run in runs:
        for file in sorted((run / f"compare_{split}").glob("*.npz")):
            with np.load(file) as record:
                if (variant := str(record["variant"])) in titles:
                    each[variant].append(scores_of(record))
    if WITHOUT not in each:
        raise SystemExit(f"no run has the joint stage without a price in compare_{split}")
    return {
        title: {
            name: float(np.mean([values[name] for values in each[variant]])) for name in COLUMNS
        }
        for variant, title in titles.items()
        if variant in each
    }


def draw(found: Found, file: Path) -> None:
    """Scores of the joint stage over the mean length of a text; a point for each price."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same file from the same numbers; letters stay letters.
    matplotlib.rcParams |= {"svg.hashsalt": "prices", "svg.fonttype": "none"}
    priced = {name: values for name, values in found.items() if name not in (START, "control")}
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for axis, score, title in (
        (axes[0], "kl_frac_mean", "kl_frac"),
        (axes[1], "fve_nrm", "fve_nrm"),
    ):
        for prefix, line, label in (("", "-", "greedy"), ("sampled_", "--", "sampled")):
            x, y = ([v[prefix + n] for v in priced.values()] for n in ("tokens", score))
            axis.plot(x, y, line, color="#d55e00", marker="o", markersize=4, label=label)
            if not prefix:
                for label, point in _labels(list(priced), x, y):
                    axis.annotate(
                        label, point, textcoords="offset points", xytext=(-6, 3), ha="right"
                    )
        axis.set(xlabel="tokens of a text, mean", title=title)
        axis.margins(x=0.1)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(file, metadata={"Date": None})


def _labels(
    names: Sequence[str], x: Sequence[float], y: Sequence[float]
) -> list[tuple[str, tuple[float, float]]]:
    """One label, with its point, for prices in succession whose texts are as long."""
    groups, near = [[0]], 0.05 * (max(x) - min(x))
    for number in range(1, len(x)):
        if abs(x[number] - x[groups[-1][0]]) <= near:
            groups[-1].append(number)
        else:
            groups.append([number])
    text = lambda group: " to ".join({names[group[0]]: 0, names[group[-1]]: 0})
    return [(text(group), (x[group[0]], y[group[0]])) for group in groups]


if __name__ == "__main__":
    main()
