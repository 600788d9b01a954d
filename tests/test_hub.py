"""Hub ids without a network: what is asked for, what is fetched, what is said when it fails."""

from __future__ import annotations

import fnmatch
import json

import huggingface_hub
import pytest
from tiny_models import write_tiny_folder

from conlens_jax import load_model
from conlens_jax.models.hub import resolve_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = [
    *("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "merges.txt", "vocab.json"),
    *("tokenizer.model", "model-00001-of-00002.safetensors", "generation_config.json"),
]
NOT_FETCHED = [
    *("pytorch_model.bin", "modeling_custom.py", "tokenization_custom.py", "tokenizer_custom.py"),
    *("consolidated.safetensors", "original/model.safetensors", "onnx/model.onnx", "README.md"),
]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A hub that answers every request with one folder."""
    write_tiny_folder(tmp_path)
    requests = []

    def snapshot_download(repo_id, **options):
        requests.append({"repo_id": repo_id, **options})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return requests


def test_a_hub_id_with_its_revision(asked):
    model = load_model("someone/tiny", revision=COMMIT)
    assert model.model_id == "someone/tiny"
    assert (asked[0]["repo_id"], asked[0]["revision"]) == ("someone/tiny", COMMIT)
    resolve_folder("someone/tiny")
    assert asked[1]["revision"] is None


def test_only_weights_shapes_and_tokenizers_are_fetched(asked):
    resolve_folder("someone/tiny")
    match = lambda name, patterns: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    fetched = lambda name: (
        match(name, asked[0]["allow_patterns"]) and not match(name, asked[0]["ignore_patterns"])
    )
    assert [name for name in REPOSITORY if not fetched(name)] == []
    assert [name for name in NOT_FETCHED if fetched(name)] == []


def test_offline_takes_the_local_cache_and_says_so_where_it_has_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    write_tiny_folder(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    download = huggingface_hub.snapshot_download
    in_cache = lambda *given, **options: download(*given, cache_dir=tmp_path, **options)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", in_cache)
    for revision in ("", COMMIT):
        folder = resolve_folder("someone/tiny", revision)
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(
        ValueError, match=r"model\.path='someone/other'.*HF_HUB_OFFLINE is set.*hf d"
    ):
        resolve_folder("someone/other")
    with pytest.raises(ValueError, match=r"at model\.revision='v9'"):
        resolve_folder("someone/tiny", "v9")


def test_folder_that_is_not_there(tmp_path):
    assert resolve_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"model\.path=.*no such folder"):
        resolve_folder(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"model\.path='nobody/no-model' is not a folder"):
        resolve_folder("nobody/no-model")
