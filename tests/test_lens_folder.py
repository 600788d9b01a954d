"""Lenses in run folders, as saved folders and on the hub: the same lens comes back."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import os
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
from pipeline import LAST_STEP, WARM_STEPS, assert_same_arrays, open_world

import conlens_jax
from conlens_jax.data.stream import TokenStream
from conlens_jax.inspection.folder import read_record
from conlens_jax.inspection.terminal import render
from conlens_jax.lens import saved
from conlens_jax.measurement.training_range import TrainingRange, tokens_seen
from conlens_jax.training.checkpoint import read_metadata
from conlens_jax.training.run_folder import checkpoint_of

TEXT = "once upon a time there was a shy"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def lens(world):
    (world.run / "metrics.json").write_text(json.dumps(METRICS), encoding="utf-8")
    try:
        return conlens_jax.Lens.load(world.run)
    finally:
        (world.run / "metrics.json").unlink()


METRICS = {"fve_nrm": 0.6225, "fve_nrm_lo": 0.61, "fve_nrm_hi": 0.63, "cos": None}
METRICS |= {"support_ece": 0.02, "support_share_at_90": 0.58, "support_right_at_90": 0.95}


@pytest.fixture(scope="module")
def folder(lens, tmp_path_factory):
    return lens.save(tmp_path_factory.mktemp("saved") / "lens")


def test_a_run_folder_gives_its_last_checkpoint(world, lens):
    folder, _ = checkpoint_of(world.run)
    stored = read_metadata(folder, LAST_STEP)
    assert (lens.facts["stage"], lens.facts["step"]) == ("joint", LAST_STEP)
    mean, scale = (stored["statistics"][name] for name in ("mean", "scale"))
    np.testing.assert_array_equal(lens.frozen["statistics"]["mean"], np.float32(mean))
    assert float(lens.frozen["statistics"]["scale"]) == pytest.approx(scale)
    assert lens.spec == world.session.spec
    row = lens.explain(TEXT, -1)[0]
    assert np.isfinite(row.best.kl)


def test_what_training_had_is_that_of_its_rows(world, lens, folder, tmp_path):
    cache = world.session.caches[0]
    rows = cache.rows(np.arange(len(cache)))
    found = lens.trained_on
    ends = (found.first_position, found.last_position)
    assert ends == (rows.positions_N.min(), rows.positions_N.max())
    norms = np.sort(np.linalg.norm(rows.activations_ND.astype(np.float64), axis=1))
    assert norms[0] < found.norms[0] < norms[1] and norms[-2] < found.norms[1] < norms[-1]
    contexts = zip(rows.tokens_NS, rows.lengths_N, strict=True)
    seen = set(itertools.chain.from_iterable(tokens[:n].tolist() for tokens, n in contexts))
    vocabulary = range(lens.spec.model.vocab_size)
    assert {token for token in vocabulary if found.has_token(token)} == seen != set(vocabulary)
    stream = TokenStream.__new__(TokenStream)
    stream._tokens_GS, stream._lengths_G = rows.tokens_NS, rows.lengths_N
    assert tokens_seen(stream.contexts(), lens.spec.model.vocab_size) == found.tokens
    assert conlens_jax.Lens.load(folder).trained_on == found


def test_lenses_of_earlier_versions_say_what_they_know(world, folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    values = json.loads((old / "config.json").read_text(encoding="utf-8"))
    del values["trained_on"]
    (old / "config.json").write_text(json.dumps(values), encoding="utf-8")
    first = world.config.dump.min_position
    assert conlens_jax.Lens.load(old).trained_on == TrainingRange(first)
    run = world.copy_run(tmp_path / "run")
    file = run / "checkpoints" / str(LAST_STEP) / "metadata" / "metadata"
    metadata = json.loads(file.read_text(encoding="utf-8"))
    del metadata["trained_on"]
    file.write_text(json.dumps(metadata), encoding="utf-8")
    last = world.config.dump.seq_len - 1 - world.config.dump.after
    assert conlens_jax.Lens.load(run).trained_on == TrainingRange(first, last)


def test_other_checkpoints_by_step_and_by_validation(world, tmp_path):
    warm = conlens_jax.Lens.load(world.run, step=WARM_STEPS)
    assert warm.facts["stage"] == "warm"
    inside = conlens_jax.Lens.load(world.run / "checkpoints" / str(WARM_STEPS))
    assert_same_arrays(inside.trainable, warm.trainable)
    assert warm.metrics == {}
    best = conlens_jax.Lens.load(world.run, step="best")
    assert best.facts["stage"] == "joint"
    with pytest.raises(ValueError, match="no checkpoint of step 77"):
        conlens_jax.Lens.load(world.run, step=77)


def test_numbers_are_of_the_checkpoint_that_was_measured(world, tmp_path):
    run = world.copy_run(tmp_path / "run")
    metrics = {**METRICS, "checkpoint_step": WARM_STEPS}
    (run / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert conlens_jax.Lens.load(run).metrics == {}
    assert conlens_jax.Lens.load(run, step=WARM_STEPS).metrics == metrics


def test_another_model_is_refused(world, tmp_path):
    copy = world.copy_run(tmp_path / "run")
    file = copy / "checkpoints" / str(LAST_STEP) / "metadata" / "metadata"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(world.session.model.weights_hash, "0" * 64), encoding="utf-8")
    with pytest.raises(ValueError, match="not the weights that the lens was trained on"):
        conlens_jax.Lens.load(copy)


def test_a_saved_lens_comes_back_bit_for_bit(lens, folder, tmp_path):
    again = conlens_jax.Lens.load(folder)
    assert_same_arrays(again.trainable, lens.trainable)
    assert_same_arrays(again.frozen, lens.frozen)
    assert again.spec == lens.spec
    assert (again.facts, again.metrics, again.add_bos) == (lens.facts, lens.metrics, lens.add_bos)
    half = conlens_jax.Lens.load(folder, dtype="bf16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.trainable)} == {"bfloat16"}
    whole = conlens_jax.Lens.load(half.save(tmp_path / "half"))
    assert_same_arrays(whole.trainable, half.trainable)
    # Small files of a lens that goes on in float32.
    small = lens.save(tmp_path / "small", dtype="bf16")
    assert_same_arrays(conlens_jax.Lens.load(small, dtype="bf16").trainable, half.trainable)
    loaded = conlens_jax.Lens.load(small)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.trainable)} == {"float32"}
    sizes = [(place / "decoder.safetensors").stat().st_size for place in (small, folder)]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_card_shows_the_measured_numbers(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| `fve_nrm` | 0.623 | 0.610 to 0.630 |" in card.replace("0.622", "0.623")
    assert card.startswith("---\nlibrary_name:") and "`cos`" not in card
    assert "| `support_ece` | 0.020 |" in card and "| `support_share_at_90` | 0.580 |" in card
    assert "How often a claim is right was not measured" in card


def test_saving_replaces_a_lens_and_nothing_else(lens, folder, tmp_path):
    assert lens.save(folder) == folder
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no lens; choose another folder"):
        lens.save(tmp_path)


def contents(folder):
    """What is in a saved lens, but for what a killed save has not finished."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    files = [file for file in files if ".unfinished-lens" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_save_that_is_stopped_leaves_one_lens_or_the_other(lens, folder, tmp_path, monkeypatch):
    """Killed at every rename: never the decoder of one and the encoder of the other."""

    class Killed(BaseException):
        pass

    moved = jax.tree.map(lambda leaf: leaf + 1, lens.trainable)
    other = dataclasses.replace(lens, trainable=moved)
    other.save(tmp_path / "other", include_model=False)
    before, after = contents(folder), contents(tmp_path / "other")
    assert "model/config.json" in before and before.keys() - after.keys()
    found = []
    for survived in itertools.count():
        target = shutil.copytree(folder, tmp_path / str(survived))
        left = itertools.count(survived, -1)

        def renamed(*arguments, real, left=left):
            if next(left) == 0:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            for name in ("replace", "rename"):
                patch.setattr(os, name, functools.partial(renamed, real=getattr(os, name)))
            try:
                other.save(target, include_model=False)
            except Killed:
                pass
            else:
                break
        assert saved.is_saved_lens(target)  # as everything that reads a folder asks first
        found.append(contents(target))
        assert found[-1] in (before, after), survived
    assert contents(target) == after
    assert before in found and after in found


def test_a_full_disk_keeps_the_saved_lens_and_is_named(lens, folder, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=f"No space left.*{folder}.*make room"):
            lens.save(folder)
        with pytest.raises(OSError, match="No space left"):
            lens.save(tmp_path / "new")
    assert contents(folder) == before
    lens.save(tmp_path / "new")
    (tmp_path / "new" / ".unfinished-lens").mkdir()  # of a kill
    lens.save(tmp_path / "new")
    assert contents(tmp_path / "new").keys() == before.keys()


def test_parts_that_do_not_fit_are_listed(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(copy / "encoder.safetensors", copy / "decoder.safetensors")
    with pytest.raises(ValueError, match="decoder.base.output_head is missing"):
        conlens_jax.Lens.load(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        conlens_jax.Lens.load(copy)


def test_a_lens_that_an_older_version_saved_is_read(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for name in ("estimator_samples", "history_sweeps"):
        del config["lens"][name]
    config["lens"] |= {"estimator": "rloo=2", "history_gradient": "sweeps=3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lens = read_record(tmp_path).lens
    assert (lens.estimator, lens.estimator_samples) == ("rloo", 2)
    assert (lens.history_gradient, lens.history_sweeps) == ("sweeps", 3)


def test_the_hub_is_asked_for_what_is_needed(lens, folder, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            uploaded = conlens_jax.Lens.load(folder_path)
            assert_same_arrays(uploaded.trainable, lens.trainable)
            calls.append(("upload", repo_id, commit_message))
            return "https://hub/commit"

    def snapshot_download(repo_id, *, allow_patterns):
        assert "*.safetensors" in allow_patterns and "model/*" in allow_patterns
        calls.append(("download", repo_id))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert lens.push_to_hub("someone/lens", private=True) == "https://hub/commit"
    assert conlens_jax.Lens.load("someone/lens").facts == lens.facts
    assert calls == [
        ("create", "someone/lens", {"private": True, "exist_ok": True}),
        ("upload", "someone/lens", "A consistency lens"),
        ("download", "someone/lens"),
    ]


def test_what_is_no_lens_is_said(monkeypatch, tmp_path):
    for path in ("no/such/folder", str(tmp_path / "none")):
        with pytest.raises(
            ValueError, match="neither a folder, a lens of this package .*smollm2.* nor a hub id"
        ):
            conlens_jax.Lens.load(path)
    with pytest.raises(ValueError, match="no checkpoint"):
        conlens_jax.Lens.load(tmp_path)


def test_a_name_that_is_no_hub_id_brings_its_model_along(lens, tmp_path):
    named = dataclasses.replace(
        lens, model=dataclasses.replace(lens.model, model_id="someone/tiny")
    )
    folder = named.save(tmp_path / "lens")
    assert not (folder / saved.MODEL_FOLDER).exists()
    assert 'base_model: "someone/tiny"' in (folder / "README.md").read_text()


# --- the terminal -------------------------------------------------------------------------------


def test_the_table_fits_the_terminal_and_is_safe(lens):
    found = lens.explain(TEXT, [3, -1], samples=2, decoding="sample")
    evil = dataclasses.replace(found[0], token="\x1b[2J\n")
    table = render(dataclasses.replace(found, rows=(evil, found[1])), colour=False, width=90)
    assert "\x1b" not in table and "·[2J⏎" in table
    lines = table.splitlines()
    rows = [line for line in lines if not line.startswith("! ")]
    assert len(rows) == 1 + 4 and max(map(len, lines)) <= 90
    assert f"{found[1].readings[1].kl:.3f}" in rows[4]
    coloured = render(found, colour=True, width=90)
    kl = found[0].readings[0].kl
    code = 32 if kl < 0.25 else 33 if kl < 1 else 31
    assert f"\x1b[{code}m{kl:.3f}" in coloured


def test_from_the_command_line(lens, folder, capsys, tmp_path):
    from absl import flags

    from conlens_jax import explain

    page = tmp_path / "page.html"
    flags.FLAGS["checkpoint"].unparse()  # a second parse would add to that of another test
    flags.FLAGS(
        ["explain", f"--checkpoint={folder}", "--json", f"--html={page}", "--positions=2,-1"]
    )
    try:
        explain.main([TEXT])
        printed = json.loads(capsys.readouterr().out)
        assert [row["position"] for row in printed["rows"]] == [2, len(lens.tokens(TEXT)) - 1]
        assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
        with pytest.raises(ValueError, match="give a text"):
            explain.main([])
        with pytest.raises(ValueError, match="3,5,-1"):
            explain.positions_of("x")
    finally:
        flags.FLAGS.unparse_flags()
