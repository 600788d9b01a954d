"""Hugging Face folders: read, written back bit for bit, and refused with every problem named."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from family_cases import each_case
from safetensors.numpy import load_file, save_file
from tiny_models import (
    TINY,
    hf_model,
    random_params,
    tiny_config,
    write_tiny_folder,
)

from conlens_jax.models.families import config_from_hf
from conlens_jax.models.hf_io import (
    load_params,
    read_config,
    save_model,
    weights_fingerprint,
)
from conlens_jax.models.mxfp4 import dequantise_mxfp4
from conlens_jax.models.tensor_files import TensorFiles

SMALL = {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder without torch; tests that break it work on a copy."""
    folder = tmp_path_factory.mktemp("original")
    write_tiny_folder(folder, **SMALL)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def load(folder, **changes):
    return load_params(folder, dataclasses.replace(read_config(folder), **changes))


def assert_same_bits(folder, other):
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].tobytes() == theirs[name].tobytes(), name


# --- round trips ----------------------------------------------------------------------------------


@each_case
def test_from_transformers_and_back_is_bit_equal(tmp_path, case):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    oracle = hf_model(case.family, **case.changes)
    oracle.save_pretrained(theirs)
    config = read_config(theirs)
    save_model(ours, config, load_params(theirs, config))
    assert_same_bits(ours, theirs)
    assert read_config(ours) == config
    reloaded, report = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert type(reloaded) is type(oracle)
    assert not any(report.values()), report
    expected, found = oracle.state_dict(), reloaded.state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].equal(found[name]), name


def test_params_survive_a_save_and_a_load(folder):
    config = read_config(folder)
    loaded = load_params(folder, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, random_params(config))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(folder, tmp_path, dtype):
    exact = load(folder)

    def round_all(tensors):
        tensors.update({name: tensor.astype(dtype) for name, tensor in tensors.items()})

    edit_tensors(folder, round_all)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), exact)
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)
    if dtype == "float16":  # is read, and neither computed in nor written
        return
    config = dataclasses.replace(read_config(folder), dtype=dtype)
    save_model(tmp_path / "again", config, load_params(folder, config))
    assert_same_bits(tmp_path / "again", folder)
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == dtype


def test_sharded_files(folder):
    expected = load(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not there: model-00002-of-00002\.safetensors"):
        load(folder)


def test_other_safetensors_files_beside_the_model_are_left_alone(folder):
    """Hub repositories carry adapters or the original layout beside model.safetensors."""
    expected = load(folder)
    save_file({"tok_embeddings": np.zeros(3)}, folder / "consolidated.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)


def test_a_tied_model_may_carry_its_head_twice(tmp_path):
    write_tiny_folder(tmp_path, tie_word_embeddings=True)
    expected = load(tmp_path)

    def add_head_and_buffer(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit_tensors(tmp_path, add_head_and_buffer)
    loaded = load(tmp_path)
    assert "output_head" not in loaded
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


# --- files of other shapes ------------------------------------------------------------------------


def random_folder(folder, family, **changes):
    config = tiny_config(family, **changes)
    save_model(folder, config, random_params(config))
    return load(folder)


def test_mxfp4_experts_of_gpt_oss(tmp_path):
    """The same model twice: experts in 4 bits, and in the floats that these stand for."""
    exact = random_folder(tmp_path, "gpt_oss", intermediate_size=64)
    rng, packed, floats = np.random.default_rng(0), {}, {}
    for layer in range(3):
        for name, outputs, inputs in (("gate_up_proj", 128, 32), ("down_proj", 32, 64)):
            name = f"model.layers.{layer}.mlp.experts.{name}"
            blocks = rng.integers(0, 256, (4, outputs, inputs // 32, 16), dtype=np.uint8)
            scales = rng.integers(118, 124, blocks.shape[:-1], dtype=np.uint8)
            packed |= {name + "_blocks": blocks, name + "_scales": scales}
            # safetensors writes memory as it lies, whatever the strides.
            floats[name] = dequantise_mxfp4(blocks, scales).astype(np.float32, order="C")
    edit_tensors(tmp_path, lambda tensors: tensors.update(floats))
    expected = load(tmp_path)

    def pack(tensors):
        for name in floats:
            tensors.pop(name)
        tensors.update(packed)

    edit_tensors(tmp_path, pack)
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), expected)
    assert not np.array_equal(exact["layers"]["up"], expected["layers"]["up"])
    edit_tensors(tmp_path, lambda tensors: tensors.pop(name + "_scales"))
    with pytest.raises(ValueError, match=r"down_proj_scales does not fit"):
        load(tmp_path)


def test_old_gpt2_files_without_a_prefix_and_with_buffers(tmp_path):
    expected = random_folder(tmp_path, "gpt2")

    def age(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
        tensors["h.0.attn.masked_bias"] = np.float32([-1e4])

    edit_tensors(tmp_path, age)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), expected)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_gemma_3(tmp_path, prefix):
    expected = random_folder(tmp_path, "gemma3_text")
    text = json.loads((tmp_path / "config.json").read_text())
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def nest(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["vision_tower.vision_model.head"] = np.ones(3, np.float32)

    edit_tensors(tmp_path, nest)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), expected)


# --- config.json ----------------------------------------------------------------------------------

V4_ROPE = {"type": "linear", "factor": 2.0}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("v4", "v5"),
    [
        (
            {"rope_theta": 5e5, "torch_dtype": "bfloat16"},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": None, "pretraining_tp": 1, "head_dim": None},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": 8},
        ),
    ],
    ids=["default", "linear", "llama3", "null"],
)
def test_both_spellings_of_config_json(v4, v5):
    assert tiny_config(**v4) == tiny_config(**v5)
    assert tiny_config(**v4).rope.theta == 5e5


def test_unknown_rope_option_is_an_error():
    with pytest.raises(ValueError, match="'yarn' does not know low_freq_factor"):
        tiny_config(rope_scaling={"type": "yarn", "factor": 2.0, "low_freq_factor": 0.7})
    with pytest.raises(ValueError, match="'linear' needs factor"):
        tiny_config(rope_scaling={"type": "linear"})


def test_unknown_model_type_names_the_known_ones():
    with pytest.raises(ValueError, match=r"model_type='mamba'.*llama"):
        config_from_hf(TINY | {"model_type": "mamba"})


# --- files that cannot be read --------------------------------------------------------------------


def test_missing_extra_and_misshaped_tensors_in_one_message(folder):
    def damage(tensors):
        tensors.pop("model.norm.weight")
        tensors.pop("model.layers.1.mlp.down_proj.bias")
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 40), np.float32)

    edit_tensors(folder, damage)
    with pytest.raises(ValueError) as error:
        load(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "missing: model.norm.weight (32,)" in message
    assert "missing: model.layers.1.mlp.down_proj.bias (32,)" in message
    assert "unexpected: model.layers.0.self_attn.q_norm.weight (8,)" in message
    assert "model.layers.0.mlp.up_proj.weight is (32, 40), by config.json (40, 32)" in message
    assert message.count("\n") == 4


def test_config_json_with_more_layers_than_the_weights(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.2\."):
        load(folder)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.9], ids=["empty", "header cut", "data cut"])
def test_truncated_safetensors(folder, kept):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        load(folder)


def test_integer_tensors_are_refused(folder):
    norm = {"model.norm.weight": np.zeros(32, np.int8)}
    edit_tensors(folder, lambda tensors: tensors.update(norm))
    with pytest.raises(ValueError, match=r"unreadable: model\.norm\.weight is stored as I8"):
        load(folder)


def test_only_pickled_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors file$"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is pickled and is not read"):
        load(folder)


def test_missing_or_broken_config_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"model\.path=.*there is no config\.json"):
        read_config(folder)


def test_an_index_with_tensors_that_the_files_lack(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "part.safetensors")
    weight_map = dict.fromkeys([*tensors, "model.layers.9.up"], "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"not there: model\.layers\.9\.up in part\.safetensors"):
        load(folder)


def test_every_file_is_checked_before_the_first_is_read(folder, monkeypatch):
    save_model(folder, read_config(folder), load(folder), max_file_bytes=20_000)
    last = max(folder.glob("model-*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    monkeypatch.setattr(TensorFiles, "array", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=rf"{last.name} is damaged or cut short.*the file has"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "own", "auto_map": {"AutoModel": "own.Model"}}, r"'own'.*is never run"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq' is not supported"),
        ({"quantization_config": {"bits": 4}}, "'unknown' is not supported"),
    ],
    ids=["remote code", "gptq", "quantised somehow"],
)
def test_models_that_are_not_read_as_they_are_stored(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(folder)


# --- saving ---------------------------------------------------------------------------------------


def test_a_large_model_is_saved_in_several_files(folder, tmp_path):
    config, ours = read_config(folder), tmp_path / "ours"
    params = load_params(folder, config)
    save_model(ours, config, params, max_file_bytes=20_000)
    files = sorted(ours.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{part + 1:05d}-of-{len(files):05d}.safetensors" for part in range(len(files))
    ]
    held = [load_file(file) for file in files]
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in held]
    assert len(files) > 2 and max(sizes) <= 20_000
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {
        name: file.name for file, part in zip(files, held, strict=True) for name in part
    }
    jax.tree.map(np.testing.assert_array_equal, load_params(ours, config), params)
    # In one file again: nothing of the old ones is left.
    save_model(ours, config, params)
    assert {file.name for file in ours.iterdir()} == {"config.json", "model.safetensors"}
    assert_same_bits(ours, folder)


def test_what_was_there_stays_until_all_is_written(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    config, params = read_config(folder), load(folder)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    calls = []

    def full_disk(*given, **options):
        calls.append(given)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save_file(*given, **options)

    monkeypatch.setattr("conlens_jax.models.model_saving.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_model(folder, config, other, max_file_bytes=20_000)
    after = {file.name: file.read_bytes() for file in folder.iterdir() if file.name in before}
    assert after == before


# --- fingerprint ----------------------------------------------------------------------------------


def test_fingerprint_changes_with_any_one_weight(folder, tmp_path):
    before = weights_fingerprint(folder)
    assert weights_fingerprint(shutil.copytree(folder, tmp_path / "copy")) == before
    seen = {before}
    for name, position in (
        ("model.embed_tokens.weight", 0),
        ("model.layers.1.self_attn.q_proj.bias", 5),
        ("lm_head.weight", -1),
    ):

        def nudge(tensors, name=name, position=position):
            flat = tensors[name].reshape(-1)
            flat[position] = np.nextafter(flat[position], np.float32(np.inf))

        edit_tensors(folder, nudge)
        seen.add(weights_fingerprint(folder))
    assert len(seen) == 4
