"""The naive step is the same function as ours, and the benchmark's numbers are numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import flat, relative_error, tiny_batch, tiny_lens, tiny_noise, tiny_spec

from benchmark import measure
from benchmark.naive import naive_loss
from benchmark.workloads import comparable, shape_workload
from conlens_jax.config import ExperimentConfig, LossConfig, WarmConfig, constant
from conlens_jax.lens.objective import Objective, joint_loss, prepare
from conlens_jax.planning.flops import causal, dump_flops, stack_cost, step_flops

WEIGHTS = {"lm": 0.5, "kl": 1.0, "mse": 2.0, "entropy": 0.3, "text": 0.0}
SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_naive_step_is_the_same_function():
    spec = tiny_spec(text_len=3)
    trainable, frozen = tiny_lens(spec)
    frozen |= {"warm_decoder": jax.tree.map(lambda leaf: 1.1 * leaf, trainable["decoder"])}
    batch, noise = tiny_batch(spec, frozen["original"]), tiny_noise(text_len=3)
    terms = {name: constant(weight) for name, weight in WEIGHTS.items()}
    objective = Objective(LossConfig(**terms, kl_horizon=2), WarmConfig(), spec)
    weights = {name: jnp.float32(weight) for name, weight in WEIGHTS.items()}
    tau = jnp.float32(0.7)

    def ours(trainable, frozen, batch):
        prepared = prepare(trainable, frozen, batch, noise, objective=objective)
        loss = lambda trainable: joint_loss(
            trainable, frozen, batch, prepared, weights, tau, objective=objective
        )
        return jax.value_and_grad(loss, has_aux=True)(trainable)

    def plain(trainable, frozen, batch):
        loss = lambda trainable: naive_loss(
            trainable, frozen, batch, noise, weights, tau, objective=objective
        )
        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (loss, terms), gradient = jax.jit(ours)(trainable, frozen, batch)
    (expected, expected_terms), expected_gradient = jax.jit(plain)(trainable, frozen, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert relative_error(terms, {name: expected_terms[name] for name in terms}) < 1e-4
    assert jax.tree.structure(gradient) == jax.tree.structure(expected_gradient)
    difference = flat(gradient) - flat(expected_gradient)
    assert np.linalg.norm(difference) < 1e-4 * np.linalg.norm(flat(expected_gradient))
    for part in ("decoder", "encoder"):
        assert (
            relative_error(gradient[part]["projection"], expected_gradient[part]["projection"])
            < 1e-4
        )


def test_flops_of_a_stack_are_those_of_its_matrices():
    """A sum over tokens, layers and pairs, written out for one small stack."""
    config = tiny_spec().model
    width, kv_width, keys = 32, 16, config.n_heads * config.head_dim
    per_token = 2 * width * (width + 2 * kv_width + width + 3 * 40)
    tokens = 5
    pairs = sum(range(1, tokens + 1))
    cost = stack_cost(config, 2, tokens, pairs, tokens, pairs)
    assert cost.weights == 2 * tokens * per_token
    assert cost.attention == 2 * pairs * 4 * keys
    # Of the last layer, only key and value of the tokens that are not read at its end.
    read_one = stack_cost(config, 2, tokens, pairs, 1, tokens)
    saved = (tokens - 1) * (per_token - 2 * width * 2 * kv_width)
    assert cost.weights - read_one.weights == saved
    assert causal(3, 2) == 4 + 5


def work(**lens):
    config, _ = comparable(ExperimentConfig())
    config = dataclasses.replace(
        config,
        lens=dataclasses.replace(config.lens, **lens),
        model=dataclasses.replace(config.model, unroll=1),
    )
    return shape_workload("tiny", config, batch=2, context=20)


def test_flops_of_a_step_follow_what_is_trained_and_how_long_the_text_is():
    full, frozen = (
        step_flops(work()),
        step_flops(work(train_decoder="frozen", train_encoder="frozen")),
    )
    assert full["total"] == pytest.approx(sum(full.values()) - full["total"])
    assert frozen["decode"] == full["decode"]
    assert frozen["backward"] < full["backward"]
    assert step_flops(work(text_len=16))["decode"] > full["decode"]
    assert 0 < dump_flops(work())["dump"] < dump_flops(work())["full"]


def test_a_shared_context_is_read_once():
    """Two rows of one document against two documents: the prefix pass of the longer row."""
    apart = work()
    config = dataclasses.replace(
        apart.config, joint=dataclasses.replace(apart.config.joint, rows_per_document=2)
    )
    shared = shape_workload("tiny", config, batch=2, context=20)
    assert shared.batch.tokens_GS.shape == (1, 20) and shared.batch.rows_per_document == 2
    # The same positions; what is shared costs as much as the longer of the two contexts, and not
    # less than half.
    positions = apart.batch.positions_B
    shared = dataclasses.replace(shared, batch=shared.batch.replace(positions_B=positions))
    ratio = step_flops(shared)["prefix pass"] / step_flops(apart)["prefix pass"]
    longer = float(positions.max() / positions.sum())
    assert 0.5 <= ratio < min(longer + 0.1, 0.95)
    same = [name for name in step_flops(apart) if name not in ("prefix pass", "total")]
    assert all(step_flops(shared)[name] == step_flops(apart)[name] for name in same)


@pytest.fixture
def small_products(monkeypatch):
    """The machine's own speed is measured on matrices that are not large."""
    monkeypatch.setitem(measure.MATRIX_SIZES, "cpu", (64,))


def test_script_measures_everything(tmp_path, capsys, small_products):
    out = tmp_path / "step.json"
    arguments = "--shape=tiny --text-len=2 --batch=4 --context=16 --repeat=1 --unroll=1"
    arguments += " --rows-per-document=2"
    result = script("benchmark_step").main([*arguments.split(), f"--json={out}"])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    phases = "noise decode reference encode swap losses forward backward gradient update step"
    for side in ("ours", "naive"):
        assert set(result[side]) >= {*phases.split(), "prefix pass"}
        for name, phase in result[side].items():
            assert 0 < phase["seconds"] < math.inf, name
            assert phase["temp_bytes"] >= 0, name
    assert "re-forward" in result["ours"] and "step detached" in result["ours"]
    assert all(0 < ratio < math.inf for ratio in result["ratios"].values())
    assert result["matmul_flops_per_s"] > 0
    printed = capsys.readouterr().out
    assert "| step detached |" in printed and "naive / ours exact:" in printed


def test_dump_script_measures_everything(tmp_path, small_products):
    out = tmp_path / "dump.json"
    arguments = "--shape=tiny --batch=2 --context=16 --repeat=1 --unroll=1"
    result = script("benchmark_dump").main([*arguments.split(), f"--json={out}"])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    for group in ("samples_per_s", "samples_per_s_limit", "ratios"):
        assert all(0 < value < math.inf for value in result[group].values())


def test_config_file_gives_model_lens_and_loss(tmp_path):
    file = tmp_path / "lens.py"
    file.write_text(
        "from conlens_jax.config import ExperimentConfig, to_config_dict\n"
        "def get_config():\n"
        "    config = to_config_dict(ExperimentConfig())\n"
        "    config.lens.dual_path = False\n"
        "    config.embedded.d_model = 32\n"
        "    config.model.layer = 1\n"
        "    config.loss.text.start = 1.0\n"
        "    return config\n",
        encoding="utf-8",
    )
    module = script("benchmark_step")
    parse = module._parser().parse_args
    work = module.workload_of(parse([f"--config={file}", "--batch=2", "--context=24"]))
    assert (work.spec.model.d_model, work.spec.layer) == (32, 1)
    assert work.spec.lens.dual_path, "the naive step has the dual path"
    assert work.batch.tokens_GS.shape == (2, 24)
    assert "text anchor" in step_flops(work)


def test_long_documents_benchmark_keeps_the_same_contexts():
    measure = script("benchmark_long_documents")._measure
    first, whole = (measure(0.05, 2, 64, tokenise_all) for tokenise_all in (False, True))
    assert (first["documents"], first["tokens"]) == (2, 2 * 64)
    assert whole["tokens"] == first["tokens"]
