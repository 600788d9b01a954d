"""Rows straight from the corpus: those of the dump, and the same losses without a cache."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipeline import WARM_STEPS, losses, make_world, open_world, quick_compilation
from test_extract import changed, dump
from test_targets import WORDS, explanations, write_jsonl

from conlens_jax.config import ConfigError, with_changes
from conlens_jax.data import prompt_writer
from conlens_jax.data.device_batches import make_batch
from conlens_jax.data.stream import open_stream
from conlens_jax.lens.batch import with_activations
from conlens_jax.training import stage_loop
from conlens_jax.training.checkpoint import all_steps
from conlens_jax.training.loop import train_lens
from conlens_jax.training.session import open_caches, training_reference
from conlens_jax.training.validation import Validation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    score = Validation({"kl_at_sampled": 1.0})
    monkeypatch.setattr(stage_loop, "validate", lambda run, trainable, frozen: score)


def streamed(world, tmp_path, **changes):
    """The world's run with its rows from the corpus, and a cache folder that is not there."""
    changes = {
        "data.source": "stream",
        "control.enabled": False,
        "run_dir": str(tmp_path / "run"),
        "dump.cache_dir": str(tmp_path / "no_cache"),
    } | changes
    return dataclasses.replace(world.session, config=with_changes(world.session.config, changes))


def test_rows_are_those_of_the_dump(world, tmp_path):
    session = streamed(world, tmp_path)
    stream, validation = open_caches(session)
    dumped = open_caches(world.session)
    assert (len(stream), len(validation)) == tuple(map(len, dumped))
    order = np.random.default_rng(0).permutation(len(stream))
    ours, theirs = stream.rows(order), dumped[0].rows(order)
    for field in dataclasses.fields(ours):
        if field.name != "activations_ND":
            np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))
    assert ours.activations_ND.shape == (len(order), 0)
    everything = np.arange(len(validation))
    held_out = [cache.rows(everything).activations_ND for cache in (validation, dumped[1])]
    np.testing.assert_allclose(*held_out, rtol=1e-5, atol=1e-6)
    statistics = [training_reference(cache) for cache in (stream, dumped[0])]
    np.testing.assert_allclose(statistics[0].mean_D, statistics[1].mean_D, rtol=1e-5, atol=1e-6)
    assert statistics[0].scale == pytest.approx(statistics[1].scale, rel=1e-5)


@pytest.mark.parametrize("kind", ["words", "facts", "file", "model"])
def test_targets_are_those_of_the_dump(tmp_path_factory, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(prompt_writer, "_PRODUCT_WIDTH", {"cpu": 64})
    with quick_compilation(tmp_path_factory):
        marks = make_world(tmp_path_factory.getbasetemp() / "marks", lens__gap_token=" ·")
        changes = {**WORDS, "target__kind": kind, "target__temperature": 1.0}
        changes["target__prompt"] = "once , <context> and"
        if kind == "file":
            write_jsonl(tmp_path / "a.jsonl", explanations(marks))
            changes["target__path"] = str(tmp_path / "a.jsonl")
        dumped = changed(marks, tmp_path, **changes)
        dump(dumped)
        stream = changed(marks, tmp_path, **changes, data__source="stream")
        for ours, theirs in zip(open_caches(stream), open_caches(dumped), strict=True):
            order = np.random.default_rng(0).permutation(len(theirs))
            found, expected = ours.rows(order), theirs.rows(order)
            assert expected.targets_NT.shape[1] and len(np.unique(expected.targets_NT, axis=0)) > 3
            for name in ("tokens_NS", "positions_N", "documents_N", "targets_NT"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        train = open_caches(stream)[0]
        captured = train.captured(20)
        np.testing.assert_array_equal(captured.targets_NT, train.rows(range(20)).targets_NT)
        assert captured.activations_ND.shape == (20, marks.config.embedded.d_model)


@pytest.mark.parametrize("rows_per_document", [1, 2])
def test_a_batch_captures_what_the_dump_wrote(world, tmp_path, rows_per_document):
    session = streamed(world, tmp_path)
    stream, _ = open_stream(session.config, session.model, session.spec, session.mesh)
    cache, _ = open_caches(world.session)
    indices = np.arange(16)
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    put = lambda source: make_batch(
        source.rows(indices), first, 16, rows_per_document=rows_per_document
    )
    original = jax.device_put(session.model.params, jax.devices()[0])
    found = jax.jit(lambda batch: with_activations(batch, original, session.spec))(put(stream))
    expected = put(cache)
    np.testing.assert_allclose(found.activation_BD, expected.activation_BD, rtol=1e-5, atol=1e-6)
    assert with_activations(expected, original, session.spec) is expected
    assert jnp.array_equal(found.tokens_GS, expected.tokens_GS)


def test_losses_are_those_of_the_cached_run(world, tmp_path):
    """Both stages; and a run that lost its last steps goes on the same way."""
    session = streamed(world, tmp_path)
    run = train_lens(session)
    found, expected = losses(run), losses(world.run)
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    # The dump keeps fp32, and Adam enlarges what rounding leaves.
    first, rest = slice(0, 1), slice(1, None)
    values = lambda entries, part: [entry[2] for entry in entries][part]
    np.testing.assert_allclose(values(found, first), values(expected, first), rtol=1e-6)
    np.testing.assert_allclose(values(found, rest), values(expected, rest), rtol=1e-3)
    assert not (tmp_path / "no_cache").exists()
    for step in all_steps(run / "checkpoints"):
        if step > WARM_STEPS:
            shutil.rmtree(run / "checkpoints" / str(step))
    train_lens(session)
    assert losses(run) == found


def test_a_wrong_source_is_named(world):
    with pytest.raises(ConfigError, match="data.source must be one of cache, stream, not 'disk'"):
        with_changes(world.session.config, {"data.source": "disk"})
