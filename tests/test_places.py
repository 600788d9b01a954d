"""Runs and lenses that are found again: moved, without their corpus, at a commit of the hub."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from pipeline import JOINT_STEPS, LAST_STEP, WARM_STEPS, assert_same_arrays, open_world
from pipeline import quiet_console as quiet
from tiny_user import TEXT, tiny_user_lens

import conlens_jax
from conlens_jax.checkpoint_flags import recorded_config
from conlens_jax.config import ConfigError, with_changes
from conlens_jax.data.extract import dump_activations
from conlens_jax.embedded import language_model
from conlens_jax.models import hub
from conlens_jax.training.checkpoint import read_metadata
from conlens_jax.training.checkpoint_storage import DamagedCheckpoint
from conlens_jax.training.loop import train_lens
from conlens_jax.training.run_folder import chosen_checkpoint
from conlens_jax.training.session import open_session

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


@pytest.fixture
def no_corpus(monkeypatch):
    """A corpus that is gone."""

    def gone(config):
        raise ValueError("corpus.path='docs' does not exist")

    monkeypatch.setattr(language_model, "open_corpus", gone)


def move(world, root: Path, *folders: str) -> Path:
    """A copy of the run and other folders of the world, whose records speak of a place that is no
    longer there; returns the run."""
    shutil.copytree(world.run, root / "run")
    for name in folders:
        shutil.copytree(world.root / name, root / name)
    records = [root / "run" / "config.json", *root.glob("run/**/metadata/metadata")]
    for file in records:
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(str(world.root), "/no/such/place"), encoding="utf-8")
    return root / "run"


def test_what_a_checkpoint_records(world):
    places = read_metadata(world.run / "checkpoints")["places"]
    model = world.session.model.folder
    assert (places["run"], places["model"]) == (str(world.run), str(model))
    assert places["cache"] == str(world.cache) and len(places["cache_identity"]) == 64
    assert read_metadata(world.run / "control" / "checkpoints")["places"]["run"] == str(
        world.run / "control"
    )


def test_a_lens_is_loaded_without_its_corpus(world, no_corpus):
    lens = conlens_jax.Lens.load(world.run)
    assert lens.facts["step"] == LAST_STEP and lens.facts["model"] == lens.model.folder.name


def test_a_run_that_moved_with_cache_and_model_is_loaded_measured_and_goes_on(
    world, tmp_path, no_corpus
):
    run = move(world, tmp_path / "a [new] place", "cache", "models")
    lens = conlens_jax.Lens.load(run)
    assert lens.model.folder.parent == run.parent / "models"
    assert_same_arrays(lens.trainable, conlens_jax.Lens.load(world.run).trainable)
    control = conlens_jax.Lens.load(run / "control")
    assert control.model.folder == lens.model.folder
    console, printed = quiet()
    session = open_session(recorded_config(str(run)), console, run=run)
    assert session.model.folder == lens.model.folder
    train, _ = session.caches
    assert train.folder == run.parent / "cache" / "train"
    assert str(run.parent / "cache") in printed.getvalue()
    # The one thing to be said is where the run is: the command line names it.
    config = with_changes(recorded_config(str(run)), {"run_dir": str(run)})
    shutil.rmtree(run / "checkpoints" / str(LAST_STEP))
    console, printed = quiet()
    train_lens(open_session(config, console, run=run))
    again, whole = (conlens_jax.Lens.load(folder) for folder in (run, world.run))
    assert again.facts["step"] == LAST_STEP
    assert_same_arrays(again.trainable, whole.trainable)
    places = read_metadata(run / "checkpoints", LAST_STEP)["places"]
    assert places["cache"] == str(run.parent / "cache")


def test_an_embedded_model_is_found_in_todays_cache_by_its_weights(world, tmp_path, no_corpus):
    run = move(world, tmp_path / "alone")
    file = run / "checkpoints" / str(LAST_STEP) / "metadata" / "metadata"
    with pytest.raises(ConfigError, match=r"weights \w{12}\) is not in .*/no/such/place") as error:
        conlens_jax.Lens.load(run)
    assert "corpus.path='docs' does not exist" in str(error.value)
    root = tmp_path / "models"
    shutil.copytree(world.session.model.folder, root / "llama-stories-by-another-name")
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("/no/such/place/models", str(root)), encoding="utf-8")
    assert conlens_jax.Lens.load(run).model.folder.parent == root


def test_other_weights_or_another_cache_are_named(world, tmp_path):
    run = move(world, tmp_path, "cache", "models")
    wanted = world.session.model.weights_hash
    # Other tests of the session may have trained further models into the folder.
    model = tmp_path / "models" / world.session.model.folder.name
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(bytes(content))
    config = with_changes(
        world.config, {"run_dir": str(run), "model.path": str(model), "embedded.cache_dir": ""}
    )
    session = open_session(config, quiet()[0])
    other = session.model.weights_hash
    with pytest.raises(ConfigError, match=rf"has weights {other[:12]}.*with {wanted[:12]}"):
        train_lens(session)
    metadata = tmp_path / "cache" / "train" / "metadata.json"
    values = json.loads(metadata.read_text())
    values["shards"][0]["sha256"] = "0" * 64
    metadata.write_text(json.dumps(values))
    chosen = world.changed(run, dump__cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"dump\.cache_dir: .* is not the cache that the run was"):
        train_lens(chosen)


def test_which_checkpoint(world):
    folder = world.run / "checkpoints"
    for word in ("latest", "last", None, LAST_STEP, str(LAST_STEP)):
        assert chosen_checkpoint(world.run, word) == (folder, LAST_STEP)
    assert chosen_checkpoint(world.run, "best")[1] > WARM_STEPS
    assert chosen_checkpoint(folder / str(WARM_STEPS), "latest") == (folder, WARM_STEPS)
    with pytest.raises(ValueError, match="latest, last, best or a number, not 'newest'"):
        chosen_checkpoint(world.run, "newest")
    with pytest.raises(ValueError, match="no checkpoint of step 7"):
        chosen_checkpoint(world.run, "7")


def test_training_beside_a_damaged_checkpoint_deletes_nothing(world, tmp_path):
    run = world.copy_run(tmp_path / "run")
    newest = run / "checkpoints" / str(LAST_STEP)
    (newest / "state" / "manifest.ocdbt").write_bytes(b"")
    before = sorted(run.rglob("*"))
    with pytest.raises(DamagedCheckpoint) as error:
        train_lens(world.changed(run))
    assert sorted(run.rglob("*")) == before
    assert f"--step={LAST_STEP - JOINT_STEPS // 2}" in str(error.value)
    newest.rename(run / f"damaged-{LAST_STEP}")  # as the message says
    train_lens(world.changed(run))
    assert_same_arrays(
        conlens_jax.Lens.load(run).trainable, conlens_jax.Lens.load(world.run).trainable
    )


# --- saved lenses -------------------------------------------------------------------------------


def test_a_saved_lens_of_a_hub_model_asks_for_the_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / COMMIT
    lens = tiny_user_lens(snapshot)
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options["revision"]))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = conlens_jax.load_model("someone/tiny", revision="a-branch", unroll=1)
    assert model.revision == COMMIT == hub.commit_of(snapshot) and not hub.commit_of(tmp_path)
    folder = dataclasses.replace(lens, model=model).save(tmp_path / "lens")
    again = conlens_jax.Lens.load(folder)
    assert asked == [("someone/tiny", "a-branch"), ("someone/tiny", COMMIT)]
    assert again.model.model_id == "someone/tiny"
    # And once more, from what was loaded.
    record = json.loads((again.save(tmp_path / "again") / "config.json").read_text())
    assert record["model"]["revision"] == COMMIT


NAMES = ("a[1] *?b", "back\\slash", "é =%20 'q\"", "x" * 200)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_lens_below_any_name(tmp_path, monkeypatch, name):
    lens = tiny_user_lens(tmp_path / name / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lens.save(f"~/{name}/lens") == tmp_path / name / "lens"
    again = conlens_jax.Lens.load(f"~/{name}/lens")
    assert_same_arrays(again.trainable, lens.trainable)
    found = again.explain(TEXT, 3)
    found.to_html(f"~/{name}/page.html")
    assert (tmp_path / name / "page.html").stat().st_size
    # The model stays where it was, and is found from another folder.
    monkeypatch.chdir(tmp_path / name)
    model = conlens_jax.load_model("model", unroll=1)
    dataclasses.replace(lens, model=model).save("outside", include_model=False)
    monkeypatch.chdir(tmp_path)
    assert conlens_jax.Lens.load(tmp_path / name / "outside").model.folder.name == "model"
    changed = tmp_path / name / "model" / "model.safetensors"
    content = bytearray(changed.read_bytes())
    content[-4] ^= 1
    changed.write_bytes(bytes(content))
    wanted = lens.model.weights_hash[:12]
    with pytest.raises(ConfigError, match=rf"has weights \w{{12}}, .*records {wanted}"):
        conlens_jax.Lens.load(tmp_path / name / "outside")


# --- paths of a config --------------------------------------------------------------------------


def test_home_in_every_path_of_a_config(monkeypatch, world):
    monkeypatch.setenv("HOME", "/home/someone")
    fields = ("run_dir", "model.path", "embedded.cache_dir", "corpus.path", "dump.cache_dir")
    fields += ("train.init_from", "train.compile_cache")
    config = with_changes(world.config, {name: "~/x y/[z]" for name in fields})
    for name in fields:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        assert value == "/home/someone/x y/[z]", name
    with pytest.raises(ConfigError) as error:
        with_changes(world.config, {"run_dir": "~nobody-here/x", "dump.cache_dir": "a\0b"})
    for path in ("my [data]", "a*", "a::b"):
        with pytest.raises(ConfigError, match=r"corpus\.path=.*as a pattern.*symbolic link"):
            with_changes(world.config, {"corpus.kind": "huggingface", "corpus.path": path})
    assert "no such user" in str(error.value) and "NUL" in str(error.value)


def test_a_run_dir_that_cannot_hold_checkpoints_is_refused_first(world, tmp_path, monkeypatch):
    monkeypatch.setattr("conlens_jax.training.session.load_model", pytest.fail)
    config = with_changes(world.config, {"run_dir": str(tmp_path / "a\\b")})
    with pytest.raises(ConfigError, match=r"run_dir: .*backslash"):
        open_session(config, quiet()[0])


def test_dump_and_train_below_an_awkward_name_that_is_relative(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.root / "models", tmp_path / "mo[d]els?")
    config = with_changes(
        world.config,
        {
            "run_dir": "r[u]n=1 é",
            "dump.cache_dir": "ca[c]he*",
            "dump.n_samples": 48,
            "dump.n_validation_samples": 32,
            "embedded.cache_dir": "mo[d]els?",
            "warm.steps": 2,
            "joint.steps": 0,
            "control.enabled": False,
        },
    )
    session = open_session(config, quiet()[0], run=config.run_dir)
    assert session.model.folder.parent == tmp_path / "mo[d]els?"
    dump_activations(config, session.model, session.spec, session.mesh, session.console)
    assert len(session.caches[0]) == 48
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "r[u]n=1 é"
    train_lens(session)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert conlens_jax.Lens.load(folder).facts["step"] == 2
    assert not any((tmp_path / "elsewhere").iterdir())
