"""``scripts/check_real_model.py`` on a tiny folder: it agrees, and it can disagree."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from test_benchmark_step import script
from tiny_models import hf_model, write_tokenizer

import conlens_jax

PROMPTS = ("word5 word9 word30", "word7", "word11 word4 word4 word40 word21 word8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("model")
    hf_model("gpt2").save_pretrained(folder)
    write_tokenizer(folder, 48)
    return folder


@pytest.fixture
def check(monkeypatch):
    module = script("check_real_model")
    monkeypatch.setattr(module, "PROMPTS", PROMPTS)
    return module.main


def test_the_same_function(folder, check, capsys):
    assert check([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "the same function: largest KL" in said and "NOT" not in said
    rows = [line.split() for line in said.splitlines() if line.strip().startswith("word")]
    assert len(rows) == len(PROMPTS)
    for row in rows:
        state, logit, _, _, top_1, greedy = map(float, row[-6:])
        assert state < 1e-5 and logit < 1e-4 and top_1 == 1 and greedy == 16


def test_another_function(folder, check, capsys, monkeypatch):
    def load(*arguments, **settings):
        model = load_model(*arguments, **settings)
        louder = jax.tree.map(lambda leaf: 1.02 * leaf, model.params)
        return dataclasses.replace(model, params=louder)

    load_model = conlens_jax.load_model
    monkeypatch.setattr(conlens_jax, "load_model", load)
    assert check([str(folder)]) == 1
    assert "NOT the same function" in capsys.readouterr().out
