"""Documents that the model writes: its own draws, whatever the batch or the interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipeline import quiet_console, tiny_config
from tiny_models import random_params, random_tokens, write_tiny_folder
from tiny_models import tiny_config as tiny_shape

import conlens_jax
from conlens_jax.config import ConfigError, CorpusConfig, MeshConfig
from conlens_jax.config.seeds import random_key
from conlens_jax.corpora.corpus import CorpusError
from conlens_jax.corpora.opening import open_corpus
from conlens_jax.corpora.prompts import read_prompts
from conlens_jax.data import model_documents, prompt_writer
from conlens_jax.data.extract import dump_activations
from conlens_jax.data.model_documents import ensure_documents, open_texts
from conlens_jax.data.stream import open_stream
from conlens_jax.models.chat import render_chat
from conlens_jax.models.decoding import Drawing, TextWriter
from conlens_jax.models.generate import generate
from conlens_jax.models.products import Products, TransposedMatrix
from conlens_jax.models.sampling import draw_token, nucleus
from conlens_jax.parallel.mesh import make_mesh
from conlens_jax.parallel.preemption import Preempted
from conlens_jax.training.session import open_session

LENGTH = 12
PROMPTS = ["word5 word6", "word7", "word9 word10 word11", "word12 word13", "word14"]
TEMPLATE = "{% for m in messages %}word40 {{ m.content }} {% endfor %}word41"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(preset="single"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_folder(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder, mesh):
    return conlens_jax.load_model(folder, mesh=mesh)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(prompt_writer, "_PRODUCT_WIDTH", {"cpu": 64})


@pytest.fixture
def config(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return CorpusConfig(
        kind="model",
        path=str(tmp_path / "texts"),
        n_documents=40,
        validation_fraction=0.25,
        prompts=str(prompts),
        max_tokens=LENGTH,
        temperature=1.0,
        batch_size=8,
    )


def written(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.jsonl"))}


def rows(folder) -> list[dict]:
    return [
        json.loads(line)
        for content in written(folder).values()
        for line in content.split(b"\n")[:-1]
    ]


draw = jax.jit(draw_token)


def texts(config, model, mesh, **changes) -> list[str]:
    """All of them, without those beyond ``n_documents``."""
    config = dataclasses.replace(config, **changes)
    folder = ensure_documents(config, model, mesh, quiet_console()[0])
    return [row["text"] for row in rows(folder)][: config.n_documents]


# --- the program --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "unroll"), [("llama", 1), ("gpt2", 0), ("gpt_oss", 0), ("gemma4_text", 0)]
)
def test_greedy_texts_are_those_of_generate(family, unroll):
    """Windows, two kinds of layers, sinks, learned positions, shared keys, inputs of layers;
    padding on both sides."""
    shape = dataclasses.replace(tiny_shape(family), unroll=unroll)
    params, mask = random_params(shape), np.ones((3, 9), bool)
    mask[0, 2:4] = mask[1, 6:] = False
    tokens, none = random_tokens(3, 9), np.zeros(0, np.int32)
    tokens[:, :2] = tokens[0, :2]
    expected = generate(
        params, tokens, mask, jnp.int32(16), None, None, None, none, slots=16, config=shape
    )
    writer, greedy = TextWriter(params, shape), Drawing(None, None, None)
    for prefix in (0, 2):
        rest = lambda rows, end=9, prefix=prefix: (tokens[rows, prefix:end], mask[rows, prefix:end])
        for rests in ([rest(slice(3))], [rest(slice(1)), rest([1], end=6), rest([2])]):
            found = writer.write(tokens[0, :prefix], rests, greedy, none, length=16, slots=32)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("equation", "shape", "n_inputs"),
    [
        ("bsd,dhx->bshx", (24, 4, 6), 1),
        ("bshx,hxd->bsd", (4, 6, 40), 2),
        ("bsd,df->bsf", (24, 9), 1),
    ],
)
def test_transposed_matrices_stay_the_left_operand(equation, shape, n_inputs):
    """XLA would fold the transposes into a product with the rows on the left, which is slower."""
    rng, outputs = np.random.default_rng(0), shape[n_inputs:]
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    x, matrix = draw(64, 1, *shape[:n_inputs]), draw(*shape)
    weights = {"matrix": TransposedMatrix.of(matrix, n_inputs)}
    compiled = jax.jit(lambda x, w: Products(w)(equation, x, "matrix")).lower(x, weights).compile()
    np.testing.assert_allclose(
        compiled(x, weights), jnp.einsum(equation, x, matrix), rtol=0, atol=1e-5
    )
    assert f"f32[{math.prod(outputs)},64]{{1,0}} dot(" in compiled.as_text()


def test_draws_are_from_the_nucleus():
    """χ² with 4,096 draws, with a vocabulary that is no multiple of the sampler's lanes."""
    logits = 2 * jax.random.normal(jax.random.key(0), (700,))
    keys = jax.random.split(jax.random.key(3), 4096)
    many = jnp.broadcast_to(logits, (4096, 700))
    for top_p in (1e-6, 0.3, 0.9, 1.0):
        limit = jnp.float32(top_p)
        drawn = np.asarray(draw(many, keys, jnp.float32(0.7), None if top_p == 1 else limit))
        probability = np.asarray(jax.nn.softmax(nucleus(logits / 0.7, limit)), np.float64)
        assert np.all(probability[drawn] > 0)
        expected, counts = 4096 * probability, np.bincount(drawn, minlength=700)
        often = expected >= 5
        distance = np.sum((counts - expected)[often] ** 2 / expected[often])
        assert distance <= often.sum() + 4 * np.sqrt(2 * often.sum())


def test_a_row_without_numbers_ends():
    logits = jnp.full((2, 300), jnp.nan)
    keys = jax.random.split(jax.random.key(0), 2)
    assert np.all(np.asarray(draw(logits, keys, jnp.float32(1.0), jnp.float32(0.5))) >= 0)


def test_documents_are_draws_from_the_whole_model(config, model, mesh):
    """Every token again, from the logits of one pass over the whole text."""
    found = texts(config, model, mesh)
    for document in [i for i, text in enumerate(found) if len(text.split()) > 5][:3]:
        prompt = model.tokenizer.encode(PROMPTS[document % len(PROMPTS)])
        text = model.tokenizer.encode(found[document])
        padding = [0] * (16 - len(prompt + text))
        logits = model.logits(np.array([prompt + text + padding]))[0]
        key = jax.random.fold_in(random_key(config.seed), document)
        for step, token in enumerate(text):
            drawn = draw(
                logits[None, len(prompt) + step - 1],
                jax.random.fold_in(key, step)[None],
                jnp.float32(config.temperature),
                jnp.float32(config.top_p),
            )
            if int(drawn[0]) <= 3:  # a special token, which a text does not show
                break
            assert drawn[0] == token, (document, step)


# --- the documents ------------------------------------------------------------------------------


def test_texts_depend_on_the_seed_and_the_document_alone(config, model, mesh):
    found = texts(config, model, mesh)
    assert texts(config, model, mesh, batch_size=16) == found
    assert texts(config, model, mesh, batch_size=16, n_documents=7) == found[:7]
    other = texts(config, model, mesh, seed=1)
    assert sum(one == two for one, two in zip(found, other, strict=True)) < 8
    assert len(set(found[:: len(PROMPTS)])) > 4, "one prompt, other draws"


def test_prompts_read_in_groups_go_on_as_each_alone(model, mesh, monkeypatch):
    """Texts come back in the order of their prompts, whichever were read together."""
    words = [f"word{number}" for number in range(5, 40)]
    numbers = np.random.default_rng(0).integers(1, 20, 8)
    prompts = [model.tokenizer.encode(" ".join(words[i : i + n])) for i, n in enumerate(numbers)]
    keys_B = jax.random.split(random_key(3), len(prompts))
    writer = prompt_writer.PromptWriter(model, mesh)
    settings = dict(max_tokens=LENGTH, temperature=1.0, most_shared=0)
    together = writer.write(prompts, keys_B, **settings)
    monkeypatch.setattr(prompt_writer, "_GROUP", 3)
    groups = writer._groups([len(prompt) for prompt in prompts])
    assert [len(rows) for rows in groups] == [3, 3, 2]
    found = writer.write(prompts, keys_B, **settings)
    for number, (one, other) in enumerate(zip(found, together, strict=True)):
        np.testing.assert_array_equal(one, other)
        (alone,) = writer.write([prompts[number]], keys_B[number : number + 1], **settings)
        np.testing.assert_array_equal(one, alone)


def test_an_interrupted_corpus_is_the_same(config, model, mesh, tmp_path, monkeypatch):
    whole = ensure_documents(config, model, mesh, quiet_console()[0])
    config = dataclasses.replace(config, path=str(tmp_path / "again"))
    write = model_documents._Batches.write

    def killed(batches, number):
        if number == 2:
            raise KeyboardInterrupt
        return write(batches, number)

    def told_to_stop(batches, number):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(batches, number)

    for strike, error, left in ((killed, KeyboardInterrupt, 2), (told_to_stop, Preempted, 3)):
        monkeypatch.setattr(model_documents._Batches, "write", strike)
        with pytest.raises(error):
            ensure_documents(config, model, mesh, quiet_console()[0])
        (folder,) = (tmp_path / "again").iterdir()
        assert len(written(folder)) == left
    monkeypatch.setattr(model_documents._Batches, "write", write)
    first = (folder / "batch-000000.jsonl").stat().st_mtime_ns
    console, printed = quiet_console()
    assert ensure_documents(config, model, mesh, console) == folder
    assert written(folder) == written(whole) and not list(folder.glob("*.tmp"))
    assert (folder / "batch-000000.jsonl").stat().st_mtime_ns == first
    assert "prompts are continued as plain text" in printed.getvalue()
    assert "done=40/40" in printed.getvalue() and "gflops_of_matrix_products=" in printed.getvalue()


def test_more_documents_are_added(config, model, mesh):
    few = texts(config, model, mesh, n_documents=10)
    (folder,) = Path(config.path).iterdir()
    assert sorted(written(folder)) == ["batch-000000.jsonl", "batch-000001.jsonl"]
    assert texts(config, model, mesh)[:10] == few
    assert list(Path(config.path).iterdir()) == [folder]


def test_other_settings_are_other_texts(config, model, mesh, tmp_path):
    describe = lambda config, model: model_documents.recipe_of(config, model, read_prompts(config))
    first = describe(config, model)
    elsewhere = tmp_path / "the same.txt"
    shutil.copy(config.prompts, elsewhere)
    same = dataclasses.replace(config, prompts=str(elsewhere), path="x", n_documents=3)
    assert {**describe(same, model), "prompts": ""} == {**first, "prompts": ""}
    for changes in (
        {"seed": 1},
        {"writes": "continuations"},
        {"prompts": ""},
        {"max_tokens": 3},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"batch_size": 16},
    ):
        assert describe(dataclasses.replace(config, **changes), model) != first, changes
    for changes in (
        {"weights_hash": "x"},
        {"config": dataclasses.replace(model.config, dtype="bfloat16")},
    ):
        assert describe(config, dataclasses.replace(model, **changes)) != first


def test_the_same_texts_are_the_same_corpus_wherever_they_are(config, model, mesh, tmp_path):
    one = open_texts(config, model, mesh, quiet_console()[0])
    moved = dataclasses.replace(config, path=str(tmp_path / "moved"))
    shutil.copytree(config.path, moved.path)
    other = open_texts(moved, model, mesh, quiet_console()[0])
    assert one.description() == other.description()
    assert one.description()["recipe"]["weights_hash"] == model.weights_hash


def test_fields_of_this_kind_are_no_part_of_other_corpora():
    names = ("writes", "prompts", "max_tokens", "temperature", "top_p", "batch_size")
    assert not set(names) & open_corpus(CorpusConfig(max_tokens=3)).description().keys()


def test_no_text_is_on_both_sides(config, model, mesh):
    """Greedy answers to five prompts: five texts."""
    greedy = dataclasses.replace(config, temperature=0.0)
    corpus = open_texts(greedy, model, mesh, quiet_console()[0])
    sides = [
        {document.text for document in corpus.documents(split)} for split in ("train", "validation")
    ]
    assert all(sides) and not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) <= len(PROMPTS)
    documents = list(corpus.documents("train"))
    assert list(corpus.documents("train", start=17)) == [d for d in documents if d.index >= 17]
    assert len(documents) < 40


def test_the_model_answers_through_its_chat_template(config, model, mesh, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "chat")
    (copy / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    chats = conlens_jax.load_model(copy, mesh=mesh)
    greedy = dataclasses.replace(config, temperature=0.0, n_documents=5)
    prompts = {
        "chat": [render_chat([{"role": "user", "content": p}], copy, answer=True) for p in PROMPTS],
        "plain": PROMPTS,
    }
    assert prompts["chat"][0] == "word40 word5 word6 word41"
    said = {}
    for name, reader in (("chat", chats), ("plain", model)):
        expected = reader.decode(reader.generate(prompts[name], LENGTH))
        said[name] = texts(greedy, reader, mesh)
        assert said[name] == expected
    assert said["chat"] != said["plain"]


def test_beginnings_are_part_of_the_document(config, model, mesh):
    found = texts(config, model, mesh, temperature=0.0, writes="continuations", n_documents=5)
    answers = texts(config, model, mesh, temperature=0.0, n_documents=5)
    assert found == [f"{p} {answer}".strip() for p, answer in zip(PROMPTS, answers, strict=True)]
    folder = ensure_documents(
        dataclasses.replace(config, writes="continuations", prompts=""),
        model,
        mesh,
        quiet_console()[0],
    )
    assert {row["prompt"] for row in rows(folder)} == {""}
    assert len({row["text"] for row in rows(folder)}) > 20


def test_an_end_token_ends_a_document_and_an_empty_one_has_an_index(config, model, mesh):
    free = texts(config, model, mesh, temperature=0.0, n_documents=5)
    first, later = (int(free[1].split()[at].removeprefix("word")) for at in (0, 4))
    ending = dataclasses.replace(
        model, config=dataclasses.replace(model.config, eos_token_ids=(2, first, later))
    )
    greedy = dataclasses.replace(config, temperature=0.0)
    found = texts(greedy, ending, mesh, n_documents=5)
    ends = {f"word{first}", f"word{later}"}
    for whole, cut in zip(free, found, strict=True):
        words = whole.split()
        stop = next((i for i, word in enumerate(words) if word in ends), len(words))
        assert cut.split() == words[:stop]
    assert found[1] == ""
    corpus = open_texts(greedy, ending, mesh, quiet_console()[0])
    indices = {d.index for split in ("train", "validation") for d in corpus.documents(split)}
    assert indices and not indices & set(range(1, 40, 5))


# --- prompts ------------------------------------------------------------------------------------


def test_topics_are_many_and_drawn_for_each_document():
    prompts = read_prompts(CorpusConfig(kind="model"))
    assert len(prompts.topics) == len(set(prompts.topics)) > 300
    assert all(request.count("{topic}") == 1 for request in prompts.texts)
    drawn = [prompts[i] for i in range(400)]
    assert len(set(drawn)) > 380 and drawn[17] == prompts[17]
    assert not any("{" in prompt for prompt in drawn)
    assert read_prompts(CorpusConfig(kind="model", seed=1))[17] != drawn[17]


def test_prompts_of_a_table(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"q": "two\\nlines"}\n{"q": ""}\n{"q": "one"}\n')
    prompts = read_prompts(CorpusConfig(kind="model", prompts=str(file), text_field="q"))
    assert [prompts[i] for i in range(3)] == ["two\nlines", "one", "two\nlines"]


# --- bad input ----------------------------------------------------------------------------------


def test_settings_that_cannot_be_used(tmp_path):
    bad = {
        "corpus__kind": "model",
        "corpus__writes": "poems",
        "corpus__top_p": 0.0,
        "corpus__temperature": -1.0,
        "corpus__max_tokens": 0,
        "corpus__batch_size": 0,
        "corpus__n_documents": 0,
    }
    with pytest.raises(ConfigError) as error:
        tiny_config(tmp_path, **bad)
    for part in (
        "corpus.writes must be one of answers, continuations",
        "corpus.top_p must be above 0 and at most 1, not 0.0",
        "corpus.temperature must not be negative",
        "corpus.max_tokens must be at least 1",
        "corpus.batch_size must be at least 1",
        "corpus.n_documents must be given for corpus.kind='model'",
        "the embedded model is itself trained on the corpus",
    ):
        assert any(part in problem for problem in error.value.problems), part


def test_prompts_that_cannot_be_used(config, model, mesh, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    long = tmp_path / "long.txt"
    long.write_text(" ".join(["word5"] * 60))
    for path, message in (
        (tmp_path / "gone.txt", "corpus.prompts=.*gone.txt': there is no such file"),
        (empty, "corpus.prompts=.*empty.txt': the file has no prompt"),
    ):
        with pytest.raises(CorpusError, match=message):
            open_corpus(dataclasses.replace(config, prompts=str(path)))
    with pytest.raises(ConfigError, match="corpus.max_tokens=12 and the 60 tokens of the prompt"):
        texts(config, model, mesh, prompts=str(long))
    with pytest.raises(ConfigError, match="corpus.batch_size=9 must be a multiple"):
        texts(config, model, make_mesh(MeshConfig(data=8)), batch_size=9)
    with pytest.raises(CorpusError, match="written by a loaded model"):
        list(open_corpus(config).documents("train"))


# --- the whole way ------------------------------------------------------------------------------


def test_a_dump_on_eight_devices_writes_and_reads_them(config, model, mesh, folder, tmp_path):
    run = tiny_config(
        tmp_path,
        model__path=str(folder),
        mesh__data=8,
        dump__seq_len=16,
        dump__n_samples=24,
        dump__n_validation_samples=8,
        dump__min_position=2,
        **{f"corpus__{f.name}": getattr(config, f.name) for f in dataclasses.fields(config)},
    )
    console, printed = quiet_console()
    session = open_session(run, console)
    dump_activations(run, session.model, session.spec, session.mesh, console)
    assert printed.getvalue().index("tokens_per_s") < printed.getvalue().index("split=train")
    folder = ensure_documents(run.corpus, session.model, session.mesh, console)
    moved = dataclasses.replace(config, path=str(tmp_path / "one device"))
    assert written(folder) == written(ensure_documents(moved, model, mesh, console))
    train, validation = session.caches
    assert (len(train), len(validation)) == (24, 8)
    assert not set(train.rows(range(24)).documents_N) & set(validation.rows(range(8)).documents_N)
    stream, _ = open_stream(run, session.model, session.spec, session.mesh)
    np.testing.assert_array_equal(stream.rows(range(24)).tokens_NS, train.rows(range(24)).tokens_NS)
