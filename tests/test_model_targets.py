"""Descriptions that a model writes: against plain forward passes, and through dumps."""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest
from pipeline import make_world, quick_compilation
from test_extract import Interrupted, all_rows, changed, contents, dump
from tiny_models import random_tokens, write_tiny_folder

import conlens_jax
from conlens_jax.config import ConfigError, MeshConfig, TargetConfig
from conlens_jax.corpora.stories import story
from conlens_jax.data import prompt_writer, shared_writer
from conlens_jax.data.cache import ActivationCache
from conlens_jax.data.cache_writer import CacheWriter
from conlens_jax.data.rows import Rows
from conlens_jax.data.targets.model import ModelTargets, first_line
from conlens_jax.data.targets.protocol import filled
from conlens_jax.models.chat import render_chat
from conlens_jax.models.tokenizer import train_bpe_tokenizer
from conlens_jax.parallel.mesh import make_mesh
from conlens_jax.training.preflight import check_files

T = 6
PROMPT = "word40 <context> word41"
TEMPLATE = "{% for m in messages %}word42 {{ m.content }} {% endfor %}word43"
MODEL = {
    "target__kind": "model",
    "target__prompt": "once , <context> and",
    "target__temperature": 1.0,
    "lens__end_token": "<eos>",
    "lens__text_len": T,
    "baseline__steps": 0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world whose model knows the marks between words."""
    with quick_compilation(tmp_path_factory):
        yield make_world(tmp_path_factory.getbasetemp() / "marks", lens__gap_token="·")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(prompt_writer, "_PRODUCT_WIDTH", {"cpu": 64})


@pytest.fixture(scope="module", params=["plain", "chat"])
def model(request, tmp_path_factory):
    """A model with random weights, with and without a chat template."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_folder(folder)
    if request.param == "chat":
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return conlens_jax.load_model(folder)


@functools.cache
def mesh():
    return make_mesh(MeshConfig(preset="single"))


def targets_of(model, tokenizer=None, longest=12, **changes) -> ModelTargets:
    config = TargetConfig(kind="model", **{"prompt": PROMPT, **changes})
    of = {"longest": longest, "batch_size": 4, "end": model.tokenizer.eos_id, "text_len": T}
    return ModelTargets(config, model, tokenizer or model.tokenizer, mesh(), **of)


def rows_of(tokens_NS, positions_N=None) -> Rows:
    """Contexts of several lengths."""
    count, length = tokens_NS.shape
    if positions_N is None:
        positions_N = 3 + np.arange(count, dtype=np.int32) % (length - 3)
    lengths_N, documents_N = np.full(count, length, np.int32), 7 * np.arange(count)
    return Rows(np.zeros((count, 0), np.float32), tokens_NS, positions_N, lengths_N, documents_N)


def continued(model, prompt: list[int]) -> list[int]:
    """The most probable continuation, up to T tokens, with a whole pass for each."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + T:
        padded = np.array([tokens + [0] * (64 - len(tokens))])
        token = int(np.argmax(model.logits(padded)[0, len(tokens) - 1]))
        if token in model.config.eos_token_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def test_descriptions_are_what_the_model_continues_the_prompt_with(model):
    rows, tokenizer = rows_of(random_tokens(6, 10)), model.tokenizer
    found = targets_of(model).texts(rows)
    for text, tokens, position in zip(found, rows.tokens_NS, rows.positions_N, strict=True):
        prompt = PROMPT.replace("<context>", tokenizer.decode(tokens[: position + 1]))
        if (model.folder / "chat_template.jinja").exists():
            prompt = render_chat([{"role": "user", "content": prompt}], model.folder, answer=True)
            assert prompt.startswith("word42 word40") and prompt.endswith("word41 word43")
        written = continued(model, tokenizer.encode(prompt))
        assert list(text) == [token for token in written if token > 3]
    assert len({tuple(text) for text in found}) > 3


def test_draws_depend_on_the_seed_the_document_and_the_position_alone(model):
    rows = rows_of(random_tokens(6, 10))
    draw = lambda rows, **changes: targets_of(model, temperature=1.0, **changes).texts(rows)
    found, order = draw(rows), [4, 0, 5]
    assert draw(rows.take(order)) == [found[row] for row in order]
    assert sum(a == b for a, b in zip(found, draw(rows, seed=1), strict=True)) < 3


def test_another_tokenizer_writes_the_same_text(model):
    bpe = train_bpe_tokenizer([story(0, index).text for index in range(40)], 300)
    texts = []
    for tokenizer in (bpe, model.tokenizer):
        tokens = tokenizer.encode("word5 word6 word7 word8")
        rows = rows_of(np.array([tokens], np.int32), np.array([len(tokens) - 1], np.int32))
        (text,) = targets_of(model, tokenizer).texts(rows)
        texts.append(tokenizer.decode(text))
    assert texts[0] == texts[1] != ""


def test_the_first_line_counts():
    bpe = train_bpe_tokenizer([story(0, index).text for index in range(40)], 300)
    text = " \n\n a fox, and\tan owl \nand more\n"
    tokens = [bpe.bos_id, *bpe.encode(text), bpe.eos_id]
    assert bpe.decode(first_line(tokens, bpe.piece)).strip() == "a fox, and\tan owl"
    assert first_line([bpe.bos_id, *bpe.encode("\n ")], bpe.piece) == []


# --- refused ------------------------------------------------------------------------------------


def test_prompts_that_cannot_be_used_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="target.prompt='nonsense <context>' has words"):
        targets_of(model, prompt="nonsense <context>")
    assert targets_of(model, longest=64 - T - 4)
    with pytest.raises(ConfigError, match="target.prompt.*more than the 64 positions"):
        targets_of(model, longest=64 - T)
    long = rows_of(random_tokens(1, 60), np.array([59], np.int32))
    with pytest.raises(ConfigError, match="target.prompt.*more than the 64 positions"):
        targets_of(model).texts(long)
    folder = shutil.copytree(model.folder, tmp_path / "loud")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content | upper }}")
    with pytest.raises(ConfigError, match="target.prompt: the chat template .* changes <context>"):
        targets_of(conlens_jax.load_model(folder))


def test_settings_that_cannot_be_used_are_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="target.prompt must contain <context>"):
        world.changed(tmp_path, **MODEL | {"target__prompt": "once"})
    nowhere = world.changed(tmp_path, **MODEL, target__model_path=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="target.model_path=.*no such folder"):
        check_files(nowhere.config, dumps=True)
    with pytest.raises(ConfigError, match="target.model_path=.*no such folder"):
        dump(nowhere)


# --- the whole way ------------------------------------------------------------------------------


def test_an_interrupted_dump_goes_on_to_the_same_descriptions(world, tmp_path, monkeypatch):
    class Dying(CacheWriter):
        def _write_shard(self, rows, cursor):
            if self._shards:
                raise Interrupted
            return super()._write_shard(rows, cursor)

    whole = changed(world, tmp_path / "whole", **MODEL)
    printed = dump(whole)
    assert printed.count("tokens_per_s=") == printed.count("gflops_of_matrix_products=") == 2
    again = changed(world, tmp_path / "again", **MODEL)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(shared_writer, "CacheWriter", Dying)
        dump(again)
    assert "resumed_after=" in dump(again)
    assert contents(tmp_path / "again" / "cache") == contents(tmp_path / "whole" / "cache")

    # On eight devices, in layers that are scanned, as on one.
    folder = tmp_path / "whole" / "cache" / "train"
    rows, model = all_rows(folder), conlens_jax.load_model(world.session.model.folder)
    one = targets_of(model, longest=36, prompt="once , <context> and", temperature=1.0)
    some = rows.take([0, 50, 191])
    assert filled(one.texts(some), T, model.tokenizer.eos_id).tolist() == some.targets_NT.tolist()
    assert len(np.unique(rows.targets_NT, axis=0)) > 150
    recorded = ActivationCache.open(folder).metadata.target
    assert {**recorded, "tokenizer_hash": "", "weights_hash": ""} == {
        **{"kind": "model", "text_len": T, "end_token": "<eos>", "temperature": 1.0, "seed": 0},
        **{"prompt": "once , <context> and", "model_path": "", "weights_hash": ""},
        **{"tokenizer_hash": "", "chat_template": None, "dtype": "float32", "quantise": ""},
    }
    assert recorded["weights_hash"] == model.weights_hash

    # Another folder with the same model writes the same.
    other = shutil.copytree(model.folder, tmp_path / "other")
    dump(changed(world, tmp_path / "copy", **MODEL, target__model_path=str(other)))
    found = all_rows(tmp_path / "copy" / "cache" / "train").targets_NT
    np.testing.assert_array_equal(found, rows.targets_NT)
