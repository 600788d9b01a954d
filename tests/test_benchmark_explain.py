"""The scripts of what explaining costs, and of what gaps trade."""

from __future__ import annotations

import io
import json
import math
import runpy

import numpy as np
import pytest
from test_benchmark_step import SCRIPTS, script, work
from tiny_user import TEXT, tiny_user_lens

from benchmark import measure
from conlens_jax import Lens
from conlens_jax.config import ExperimentConfig, from_config_dict, to_json_dict, with_changes
from conlens_jax.measurement.aggregates import mean_of
from conlens_jax.planning.flops import explain_flops, stack_cost, step_flops
from studies.joint_variants import VARIANTS


def test_flops_of_explaining_are_those_of_its_parts():
    """Of the first position alone: M reads one token; D and E do what they do in a step."""
    step = work()
    spec, config = step.spec, step.spec.model
    of_step, rows = step_flops(step), len(step.batch.positions_B)
    read = stack_cost(config, config.n_layers, 1, 1, 1, 1).total
    upper = stack_cost(config, config.n_layers - spec.layer - 1, 1, 1, 1, 1).total
    heads = 3 * 2 * config.d_model * config.vocab_size
    parts = (of_step["decode"] + of_step["encode"]) / rows
    found = explain_flops(spec, np.array([0]))
    assert found == pytest.approx(parts + read + 2 * upper + heads)
    # More positions of a document share its reading, and see more of it.
    both, last = explain_flops(spec, np.arange(2)), explain_flops(spec, np.array([1]))
    assert both == pytest.approx(last + found - read)


def test_explain_script_measures_everything(tmp_path, monkeypatch, capsys):
    lens = tiny_user_lens(tmp_path / "model")
    monkeypatch.setattr(Lens, "load", lambda checkpoint: lens)
    monkeypatch.setitem(measure.MATRIX_SIZES, "cpu", (64,))
    module, out = script("benchmark_explain"), tmp_path / "explain.json"
    monkeypatch.setattr(module, "example_text", lambda lens: TEXT)
    arguments = "--checkpoint=x --tokens=12 --batch=4 --repeat=1"
    result = module.main([*arguments.split(), f"--json={out}"])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    assert result["explanations"] == 12
    assert all(0 < seconds < math.inf for seconds in result["seconds"].values())
    assert 0 < result["share"] < 1
    longest = lens.model.config.max_positions
    arguments = f"--checkpoint=x --tokens={longest + 5} --batch={longest} --repeat=1"
    assert module.main(arguments.split())["explanations"] == longest
    assert "12 explanations of 4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_change_of_the_quickstart(name):
    """Whatever the quickstart's own joint stage is."""
    page = runpy.run_path(str(SCRIPTS.parent / "configs" / "quickstart.py"))
    with_changes(from_config_dict(page["get_config"]().to_dict()), VARIANTS[name])


def test_gap_rates_are_averaged_over_runs(tmp_path, monkeypatch, capsys):
    module, config = script("gap_rates"), ExperimentConfig()
    names = [name for name in module.COLUMNS if name != "left_out"]
    columns = {name: mean_of(name) for name in [*names, "context_words_said"]}
    monkeypatch.setattr(module, "scores", lambda rows, resultant: columns)
    runs = []
    for number, (rate, value) in enumerate([(0.1, 0.2), (0.1, 0.4), (0.0, 0.7)]):
        runs.append(tmp_path / str(number))
        folder = runs[-1] / "compare_test"
        folder.mkdir(parents=True)
        changes = {"warm.gap_rate": rate, "target.context_words": 2, "lens.gap_token": "."}
        values = to_json_dict(with_changes(config, changes))
        (runs[-1] / "config.json").write_text(json.dumps(values), encoding="utf-8")
        (runs[-1] / "checkpoints").mkdir()
        for stage in ("warm start", "supervised", "another variant"):
            rows = {f"row:{name}": np.full(4, value) for name in columns}
            contents = io.BytesIO()
            facts = {"variant": stage, "resultant": 0.0, "documents_N": np.arange(4)}
            np.savez(contents, **facts, **rows)
            (folder / f"{stage}.npz").write_bytes(contents.getvalue())
    found = module.main([*map(str, runs), "--split=test"])
    assert list(found) == [(0.0, "warm start"), (0.0, "supervised")] + [
        (0.1, "warm start"),
        (0.1, "supervised"),
    ]
    assert found[0.1, "supervised"]["fve_nrm"] == pytest.approx(0.3)
    assert found[0.1, "warm start"]["left_out"] == pytest.approx(1 - 0.3 / 2)
    assert "| 0.1 | control | 0.300 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no run has a folder compare_validation"):
        module.main([str(runs[0])])


def test_prices_are_shown_in_their_order(tmp_path, monkeypatch, capsys):
    """With the mean over the runs, and drawn; other variants are left out."""
    gaps, module = script("gap_rates"), script("prices")
    columns = {name: mean_of(name) for name in module.COLUMNS}
    monkeypatch.setattr(gaps, "scores", lambda rows, resultant: columns)
    monkeypatch.setattr(module, "scores_of", gaps.scores_of)
    stages = ("st, length 1.0", "st, length 0.5", "straight-through", "supervised", "reinmax")
    for number in range(2):
        folder = tmp_path / str(number) / "compare_test"
        folder.mkdir(parents=True)
        for place, stage in enumerate(stages):
            rows = {f"row:{name}": np.full(4, number + place) for name in columns}
            facts = {"variant": stage, "resultant": 0.0, "documents_N": np.arange(4)}
            np.savez(folder / f"{place}.npz", **facts, **rows)
    runs, picture = [str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / "prices.svg"
    found = module.main([*runs, "--split=test", f"--svg={picture}"])
    assert {name: values["tokens"] for name, values in found.items()} == {
        **{"control": 3.5, "0": 2.5, "0.5": 1.5, "1": 0.5}
    }
    assert list(found) == ["control", "0", "0.5", "1"]
    assert "| 0.5 | 1.500 |" in capsys.readouterr().out
    assert ">0.5</text>" in picture.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="no run has the joint stage"):
        module.main([*runs, "--split=validation"])
