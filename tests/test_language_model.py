"""The embedded language model: it learns, it is an ordinary folder, and it is made only once."""

from __future__ import annotations

import functools
import json
import math
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from pipeline import open_world, quiet_console, tiny_config
from tiny_models import random_tokens
from tiny_models import tiny_config as tiny_transformer_config

from conlens_jax.config import ExperimentConfig, from_config_dict, with_changes
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.embedded import language_model
from conlens_jax.embedded.language_model import ensure_language_model
from conlens_jax.models.model import load_model
from conlens_jax.models.transformer import forward

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def statistics(world) -> dict:
    file = world.session.model.folder / language_model.STATISTICS_FILE
    return json.loads(file.read_text(encoding="utf-8"))


def ensure(config: ExperimentConfig) -> tuple[Path, str]:
    console, stream = quiet_console()
    return ensure_language_model(config, console), stream.getvalue()


def test_lm_loss_is_the_loss_on_whole_held_out_documents(world, statistics):
    """Computed again, with the model as it was loaded and in numpy."""
    model, config = world.session.model, world.config
    total = count = nats = 0.0
    for document in open_corpus(config.corpus).documents("validation"):
        tokens = model.tokenizer.encode(document.text, add_bos=True)
        if len(tokens) > config.embedded.seq_len:
            continue
        padded = np.pad(tokens, (0, config.embedded.seq_len - len(tokens)))
        logits = np.asarray(model.logits(padded[None]))[0, : len(tokens) - 1]
        log_p = jax.nn.log_softmax(logits)
        total -= float(np.sum(np.asarray(log_p)[np.arange(len(tokens) - 1), tokens[1:]]))
        count += len(tokens) - 1
        nats += document.nats
    assert count > 200
    assert statistics["lm_loss"] == pytest.approx(total / count, rel=1e-4)
    assert statistics["generator_entropy"] == pytest.approx(nats / count, rel=1e-6)


def test_training_lowers_the_loss(world, statistics):
    blind = math.log(world.session.model.config.vocab_size)
    assert statistics["generator_entropy"] < statistics["lm_loss"] < blind - 1.0


def test_second_call_finds_the_model(world, monkeypatch):
    monkeypatch.setattr(language_model, "train_language_model", None)  # would fail if called
    folder, printed = ensure(world.config)
    assert folder == world.session.model.folder and "found=" in printed


def test_the_same_recipe_gives_the_same_weights(world, tmp_path):
    folder, printed = ensure(with_changes(world.config, {"embedded.cache_dir": str(tmp_path)}))
    assert "saved=" in printed and folder.name == world.session.model.folder.name
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (folder / name).read_bytes() == (world.session.model.folder / name).read_bytes()


def test_the_model_of_the_quickstart_is_part_of_the_package(tmp_path):
    """Found by its recipe: another grammar, tokenizer or setting would be another name."""
    get_config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]
    config = with_changes(from_config_dict(get_config()), {"embedded.cache_dir": str(tmp_path)})
    folder, printed = ensure(config)
    assert folder.parent == language_model.SHIPPED and "found=" in printed
    assert not list(tmp_path.iterdir())


def test_a_model_of_the_package_that_is_not_as_shipped(world, tmp_path):
    name = world.session.model.folder.name
    shutil.copytree(world.session.model.folder, tmp_path / "shipped" / name)
    ensure = functools.partial(
        ensure_language_model, console=quiet_console()[0], shipped=tmp_path / "shipped"
    )
    config = with_changes(world.config, {"embedded.cache_dir": str(tmp_path / "none")})
    file = tmp_path / "shipped" / name / language_model.STATISTICS_FILE
    digest = language_model.weights_digest(world.session.model.folder)
    recorded = {**json.loads(file.read_text(encoding="utf-8")), "sha256": digest}
    file.write_text(json.dumps(recorded), encoding="utf-8")
    assert ensure(config) == tmp_path / "shipped" / name
    file.write_text(json.dumps({**recorded, "sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(ValueError, match="not those that were shipped"):
        ensure(config)


def build_nothing(corpus, config, folder, console, marks):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return {}


@pytest.mark.parametrize("name", ["embedded.seed", "embedded.steps", "corpus.n_documents"])
def test_another_recipe_is_another_folder(tmp_path, monkeypatch, name):
    monkeypatch.setattr(language_model, "train_language_model", build_nothing)
    config = tiny_config(tmp_path)
    first, _ = ensure(config)
    other, _ = ensure(with_changes(config, {name: 77}))
    assert first != other and first.parent == other.parent == tmp_path / "models"
    assert ensure(with_changes(config, {"joint.steps": 77}))[0] == first


def test_cache_folder_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CONLENS_CACHE", str(tmp_path / "elsewhere"))
    config = with_changes(tiny_config(tmp_path), {"embedded.cache_dir": ""})
    assert language_model.cache_root(config.embedded) == tmp_path / "elsewhere"
    assert language_model.cache_root(tiny_config(tmp_path).embedded) == tmp_path / "models"


def test_interrupted_training_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def interrupted(corpus, config, folder, console, marks):
        build_nothing(corpus, config, folder, console, marks)
        raise KeyboardInterrupt

    config = tiny_config(tmp_path)
    monkeypatch.setattr(language_model, "train_language_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure(config)
    monkeypatch.setattr(language_model, "train_language_model", build_nothing)
    folder, printed = ensure(config)
    assert "saved=" in printed
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_copying_init_puts_the_attended_word_first(n_kv_heads):
    """From the start, attention that looks evenly at all words raises just those words."""
    config = tiny_transformer_config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        head_dim=16,
        initializer_range=64**-0.5,
    )
    tokens = np.arange(5, 13)[None]
    params = language_model.copying_init(config, seed=0, strength=4.0)
    logits = np.asarray(forward(params, tokens, config=config))[0, -1]
    plain = language_model.copying_init(config, seed=0, strength=0.0)
    before = np.asarray(forward(plain, tokens, config=config))[0, -1]
    contrast = lambda x: (x[5:12].mean() - np.delete(x, range(5, 13)).mean()) / x.std()
    assert contrast(logits) > 0.5 > abs(contrast(before))


def test_seen_before_looks_only_back_and_in_its_row():
    tokens = np.array([[1, 2, 1, 3, 2], [3, 3, 4, 5, 1]])
    expected = [[False, True, False, True], [True, False, False, False]]
    np.testing.assert_array_equal(language_model.seen_before(tokens), expected)


def test_transformers_reads_the_folder(world):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours = world.session.model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ours.folder, dtype="float32").eval()
    tokens = random_tokens(2, 12, vocab_size=ours.config.vocab_size)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(ours.logits(tokens), expected, rtol=1e-3, atol=1e-4)
    text = "once upon a time there was a cat ."
    tokenizer = transformers.AutoTokenizer.from_pretrained(ours.folder)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours.tokenizer.encode(text)


def test_real_text_works_too(tmp_path):
    changes = {
        "corpus__kind": "stdlib",
        "corpus__n_documents": 60,
        "embedded__steps": 3,
        "embedded__batch_size": 8,
    }
    folder, _ = ensure(tiny_config(tmp_path, **changes))
    model = load_model(folder)
    assert model.config.vocab_size == 320
    text = "Return the sum of x."
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    statistics = json.loads((folder / language_model.STATISTICS_FILE).read_text())
    assert "generator_entropy" not in statistics and 0 < statistics["lm_loss"] < 10
    assert folder.name.startswith("llama-stdlib-")


def test_a_task_with_answers_is_scored(tmp_path):
    changes = {
        "corpus__kind": "sums",
        "corpus__n_documents": 60,
        "model__layer": 0,
        "embedded__n_layers": 1,
        "embedded__steps": 2,
        "embedded__batch_size": 8,
    }
    folder, _ = ensure(tiny_config(tmp_path, **changes))
    statistics = json.loads((folder / language_model.STATISTICS_FILE).read_text())
    assert folder.name.startswith("llama-sums-")
    assert statistics["exact_answers"] == 0 <= statistics["answers_right"] < 0.5
    assert 0 < statistics["generator_entropy"] < statistics["lm_loss"]
