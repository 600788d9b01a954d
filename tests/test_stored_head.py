"""A head that the files hold beside the embedding: what transformers makes of it, we make too."""

from __future__ import annotations

import json
import logging
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import hf_model, random_params, random_tokens, tiny_config, write_tiny_folder

import conlens_jax
from conlens_jax.config import MeshConfig
from conlens_jax.models import tensor_files
from conlens_jax.models.hf_io import load_params, read_config, save_model
from conlens_jax.parallel.mesh import make_mesh

EMBEDDING = {
    "llama": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "gpt_neox": "gpt_neox.embed_in.weight",
}


def tied_folder(folder, family="llama"):
    config = tiny_config(family, tie_word_embeddings=True)
    save_model(folder, config, random_params(config))
    return folder


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_head(folder, name, family="llama", change=0.0):
    def edit(tensors):
        tensors[name] = tensors[EMBEDDING[family]].copy()
        tensors[name][-1, -1] += change

    edit_tensors(folder, edit)


def oracle_logits(folder, tokens):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("change", [0.0, 3.0], ids=["equal", "different"])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "lm_head.weight"),
        ("llama", "model.lm_head.weight"),
        ("gpt2", "lm_head.weight"),
        ("gpt2", "transformer.lm_head.weight"),
        ("gpt_neox", "embed_out.weight"),
        ("gpt_neox", "lm_head.weight"),
        ("gpt_neox", "gpt_neox.lm_head.weight"),
    ],
)
def test_a_stored_head_of_a_tied_model(tmp_path, caplog, family, name, change):
    tied_folder(tmp_path, family)
    add_head(tmp_path, name, family, change)
    tokens = random_tokens(2, 5)
    model = conlens_jax.load_model(tmp_path, unroll=1)
    np.testing.assert_allclose(model.logits(tokens), oracle_logits(tmp_path, tokens), atol=1e-5)
    assert model.config.tied_embeddings == (not change)
    assert ("output_head" in model.params) == bool(change)
    said = [record for record in caplog.records if record.name.startswith("conlens_jax")]
    assert [record.levelno for record in said] == [logging.WARNING] * bool(change)
    if change:
        assert "tie_word_embeddings is true" in said[0].getMessage()
        assert EMBEDDING[family] in said[0].getMessage()


@pytest.mark.parametrize("family", EMBEDDING)
def test_files_with_the_head_alone(tmp_path, family):
    """safetensors keeps one of two tensors that share their memory; it may be the head."""
    expected = load_params(tied_folder(tmp_path, family), read_config(tmp_path))
    head = "embed_out.weight" if family == "gpt_neox" else "lm_head.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({head: tensors.pop(EMBEDDING[family])}))
    assert read_config(tmp_path).tied_embeddings
    found = load_params(tmp_path, read_config(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_head_of_its_own_on_a_mesh_in_int8_and_written_back(tmp_path):
    add_head(tied_folder(tmp_path / "theirs"), "lm_head.weight", change=3.0)
    folder, ours, tokens = tmp_path / "theirs", tmp_path / "ours", random_tokens(2, 5)
    plain = conlens_jax.load_model(folder, unroll=1)
    sharded = conlens_jax.load_model(folder, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)), unroll=1)
    np.testing.assert_allclose(sharded.logits(tokens), plain.logits(tokens), atol=1e-5)
    int8 = conlens_jax.load_model(folder, quantise="int8", unroll=1)
    np.testing.assert_allclose(int8.logits(tokens), plain.logits(tokens), atol=0.3)
    assert abs(np.asarray(plain.logits(tokens))[..., -1]).max() > 1.0
    save_model(ours, plain.config, plain.params)
    assert json.loads((ours / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_allclose(oracle_logits(ours, tokens), plain.logits(tokens), atol=1e-5)


def test_the_plan_counts_a_head_of_its_own(tmp_path):
    from conlens_jax.config import ExperimentConfig
    from conlens_jax.planning.model_source import planned_model

    add_head(tied_folder(tmp_path), "lm_head.weight", change=1.0)
    shape = lambda: planned_model(ExperimentConfig(), str(tmp_path)).shape
    assert not shape().tied_embeddings
    # Without all of the weights, a plan goes by config.json.
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert shape().tied_embeddings


@pytest.mark.parametrize(
    ("head", "same"),
    [
        (lambda stored: stored.astype(np.float16).astype(np.float32), True),
        (lambda stored: np.where(stored == 0, -0.0, stored), True),
        (lambda stored: stored.astype(np.float64), True),
        (lambda stored: np.nextafter(stored.astype(np.float64), np.inf), False),
        (lambda stored: stored[:-1].copy(), False),
    ],
    ids=["float32", "minus zero", "float64", "a bit more in float64", "shorter"],
)
def test_values_are_compared_and_not_their_storage(tmp_path, monkeypatch, head, same):
    monkeypatch.setattr(tensor_files, "_COMPARED_BYTES", 7 * 32 * 8)

    def edit(tensors):
        stored = tensors[EMBEDDING["llama"]].astype(np.float16)
        stored[3, 3] = 0
        tensors[EMBEDDING["llama"]] = stored
        tensors["lm_head.weight"] = head(stored)

    edit_tensors(tied_folder(tmp_path), edit)
    assert read_config(tmp_path).tied_embeddings == same
    if head(np.zeros((48, 32), np.float16)).shape != (48, 32):
        with pytest.raises(ValueError, match=r"lm_head\.weight is \(47, 32\)"):
            load_params(tmp_path, read_config(tmp_path))


# --- other names of the same tensors --------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("twice", [False, True], ids=["no prefix", "prefix twice"])
def test_a_prefix_that_is_missing_or_there_twice(tmp_path, family, twice):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    hf_model(family).save_pretrained(tmp_path)
    expected = load_params(tmp_path, read_config(tmp_path))
    prefix = {"gpt_neox": "gpt_neox.", "gpt2": "transformer."}.get(family, "model.")

    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name if twice else name.removeprefix(prefix)] = tensors.pop(name)
        tensors[prefix * twice + "rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["layers.0.nothing"] = np.zeros((0, 4), np.float32)

    edit_tensors(tmp_path, rename)
    found = load_params(tmp_path, read_config(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if family == "llama":
        _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]


def test_two_names_of_one_tensor(tmp_path):
    write_tiny_folder(tmp_path / "model")
    folder = tmp_path / "model"
    expected = load_params(folder, read_config(folder))

    def add(tensors):
        tensors["model.lm_head.weight"] = tensors["lm_head.weight"].copy()

    edit_tensors(folder, add)
    jax.tree.map(np.testing.assert_array_equal, load_params(folder, read_config(folder)), expected)
    other = shutil.copytree(folder, tmp_path / "other")
    edit_tensors(other, lambda tensors: tensors.update(norm=tensors["model.norm.weight"]))
    edit_tensors(
        other, lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"] + 1})
    )
    with pytest.raises(ValueError, match=r"model\.norm\.weight as .*norm\.weight and .*norm\.weig"):
        load_params(other, read_config(other))
