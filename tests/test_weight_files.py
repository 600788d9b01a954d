"""Which file of a folder a tensor is read from, and what is wrong with files that cannot be."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_tiny_folder

from conlens_jax.models.hf_io import load_params, read_config, weights_fingerprint
from conlens_jax.models.tensor_files import TensorFiles

EMBEDDING = "model.embed_tokens.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def load(folder):
    return load_params(folder, read_config(folder))


class Sharded:
    """A model in two files, every second tensor in each, and its index."""

    def __init__(self, folder):
        write_tiny_folder(folder, num_hidden_layers=1)
        self.folder, self.expected = folder, load(folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        self.files = {
            FIRST: {name: tensors[name] for name in names[::2]},
            SECOND: {name: tensors[name] for name in names[1::2]},
        }
        self.index = {name: file for file, held in self.files.items() for name in held}
        self.home = self.index[EMBEDDING]
        self.other = SECOND if self.home == FIRST else FIRST

    def write(self, index=True):
        for file, held in self.files.items():
            (self.folder / file).parent.mkdir(exist_ok=True)
            save_file(held, self.folder / file)
        if index:
            self.write_index({"weight_map": self.index})
        return self.folder

    def write_index(self, content):
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(content))

    def copy_embedding(self, change):
        self.files[self.other][EMBEDDING] = self.files[self.home][EMBEDDING] + np.float32(change)


@pytest.fixture
def sharded(tmp_path):
    return Sharded(tmp_path)


def test_the_index_decides_between_two_copies(sharded, caplog):
    sharded.copy_embedding(1.0)
    found = load(sharded.write())
    jax.tree.map(np.testing.assert_array_equal, found, sharded.expected)
    assert f"several files contain {EMBEDDING}" in caplog.text
    before = weights_fingerprint(sharded.folder)
    sharded.index[EMBEDDING] = sharded.other
    other = load(sharded.write())
    assert weights_fingerprint(sharded.folder) != before
    np.testing.assert_array_equal(other["embedding"], sharded.expected["embedding"] + 1)


@pytest.mark.parametrize("index", [True, False], ids=["an index without it", "no index"])
def test_copies_that_no_index_decides_between_must_be_equal(sharded, index):
    sharded.copy_embedding(0.0)
    del sharded.index[EMBEDDING]
    found = load(sharded.write(index))
    jax.tree.map(np.testing.assert_array_equal, found, sharded.expected)
    sharded.copy_embedding(1.0)
    with pytest.raises(ValueError, match=f"different values.*: {EMBEDDING} in {FIRST}, {SECOND}"):
        load(sharded.write(index))


def test_copies_in_a_dtype_that_cannot_be_read_are_compared_too(sharded):
    for held in sharded.files.values():
        held["steps"] = np.arange(3)
    files = TensorFiles(sharded.write(index=False))
    assert files["steps"].dtype == "I64"
    sharded.files[SECOND]["steps"] = np.arange(1, 4)
    with pytest.raises(ValueError, match="steps in"):
        TensorFiles(sharded.write(index=False))


def test_what_the_index_leaves_out_is_read_as_transformers_does(sharded):
    del sharded.index[EMBEDDING]
    found = load(sharded.write())
    jax.tree.map(np.testing.assert_array_equal, found, sharded.expected)


def test_files_in_folders_of_their_own(sharded):
    sharded.files = {f"parts/{file}": held for file, held in sharded.files.items()}
    sharded.index = {name: f"parts/{file}" for name, file in sharded.index.items()}
    found = load(sharded.write())
    jax.tree.map(np.testing.assert_array_equal, found, sharded.expected)


def test_several_files_without_an_index(sharded, caplog):
    found = load(sharded.write(index=False))
    jax.tree.map(np.testing.assert_array_equal, found, sharded.expected)
    assert "no model.safetensors.index.json, so all 2 files are read" in caplog.text


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_that_is_none(sharded, content):
    sharded.write()
    sharded.write_index(content)
    with pytest.raises(
        ValueError, match=r"index\.json (must contain a JSON object|has no weight_map)"
    ):
        load(sharded.folder)


def test_a_tensor_that_lies_in_another_file_than_the_index_says(sharded):
    sharded.index[EMBEDDING] = sharded.other
    message = rf"not there: {EMBEDDING} in {sharded.other} \(it is in {sharded.home}\)"
    with pytest.raises(ValueError, match=message):
        load(sharded.write())


def test_a_shard_that_is_cut_short(sharded):
    file = sharded.write() / SECOND
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(
        ValueError, match=rf"{SECOND} is damaged or cut short: .* describes .*bytes"
    ):
        load(sharded.folder)


def header(values) -> bytes:
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "Git LFS pointer.*lfs pull",
        ),
        (header([]), "its header is not a JSON object"),
        (header({"a": {"dtype": "F32", "shape": [1]}}), "does not describe 'a'"),
        (header({"a": 1}), "does not describe 'a'"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}), "not describe 'a'"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "has 4 bytes"),
    ],
    ids=["lfs", "list", "no offsets", "number", "one offset", "size"],
)
def test_files_that_are_no_safetensors(sharded, content, message):
    (sharded.write() / SECOND).write_bytes(content)
    with pytest.raises(ValueError, match=f"{SECOND} is.*{message}"):
        load(sharded.folder)


def test_dtypes_may_differ_within_a_file(sharded):
    tensors = {name: tensor for held in sharded.files.values() for name, tensor in held.items()}
    rounded = {
        name: tensor.astype(("float16", "bfloat16", "float64")[n % 3])
        for n, (name, tensor) in enumerate(tensors.items())
    }
    save_file(rounded, sharded.folder / "model.safetensors")
    found = load(sharded.folder)
    expected = {name: tensor.astype(np.float32) for name, tensor in rounded.items()}
    save_file(expected, sharded.folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found, load(sharded.folder))


def test_eight_bits_without_a_scale_are_refused(sharded):
    import ml_dtypes

    norm = {"model.norm.weight": np.zeros(32, ml_dtypes.float8_e4m3fn)}
    tensors = {name: tensor for held in sharded.files.values() for name, tensor in held.items()}
    save_file(tensors | norm, sharded.folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as F8_E4M3, not F64"):
        load(sharded.folder)
