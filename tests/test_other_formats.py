"""Folders that are no model as it is read here: one message with the file and the fix."""

from __future__ import annotations

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import hf_model, write_tiny_folder

from conlens_jax.models.hf_io import load_params, read_config
from conlens_jax.models.model import load_model
from conlens_jax.training.preflight import _model_problems

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    write_tiny_folder(tmp_path, num_hidden_layers=1)
    return tmp_path


def write(folder, name, **values):
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def set_keys(folder, **changes):
    write(folder, "config.json", **json.loads((folder / "config.json").read_text()) | changes)


def refused(folder) -> str:
    """The message of the library, which a command has too before it begins."""
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert [str(error.value)] == list(_model_problems("model.path", str(folder)))
    return str(error.value)


def test_a_pickled_model_is_read_after_the_command_of_the_message(tmp_path):
    torch = pytest.importorskip("torch")
    model = hf_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    message = refused(tmp_path)
    assert "pytorch_model.bin is pickled and is not read; convert it" in message
    exec(re.search('python -c "(.+)"', message)[1])
    loaded = load_params(tmp_path, read_config(tmp_path))
    head = model.lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(loaded["output_head"], head.T)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("consolidated.00.pth", r"consolidated\.00\.pth is pickled and is not read$"),
        ("tiny.Q4_K.gguf", r"for tiny\.Q4_K\.gguf, give that file as model\.path$"),
        ("flax_model.msgpack", r"flax_model\.msgpack is of another program and is not read$"),
    ],
)
def test_what_is_there_instead_of_safetensors_is_named(folder, there, message):
    (folder / WHOLE).rename(folder / there)
    assert re.search(
        rf"^model\.path={folder}: there is no \.safetensors file; {message}", refused(folder)
    )


def test_the_original_layout_of_a_maker(folder):
    (folder / WHOLE).rename(folder / "consolidated.safetensors")
    assert "consolidated.safetensors has its maker's own layout" in refused(folder)


@pytest.mark.parametrize("config", [True, False], ids=["with config.json", "without"])
def test_an_adapter_names_its_base_and_how_to_merge_it(folder, config):
    (folder / WHOLE).rename(folder / "adapter_model.safetensors")
    if not config:
        (folder / "config.json").unlink()
    write(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="Qwen/Qwen3-8B")
    message = refused(folder)
    assert f"model.path={folder} is an adapter (LORA) of the model 'Qwen/Qwen3-8B'" in message
    assert f"Model.from_pretrained('{folder}').merge_and_unload()" in message


def test_a_model_beside_an_adapter_is_read_without_it(folder, caplog):
    write(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="x")
    read_config(folder)
    assert "read without the adapter" in caplog.text


@pytest.mark.parametrize(
    ("changes", "beside", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "", "GPTQ"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "", "AWQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "", "bitsandbytes"),
        ({"quantization_config": {"load_in_4bit": True}}, "", "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "", "FP8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "", "compressed-tensors"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "", "ModelOpt"),
        ({"quantization_config": {"quant_method": "hqq"}}, "", "hqq"),
        ({"quantization_config": {"bits": 4}}, "", "unknown"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "", "MLX"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "", "AWQ"),
        ({}, "quantize_config.json", "GPTQ"),
        ({}, "quant_config.json", "AWQ"),
        ({}, "hf_quant_config.json", "ModelOpt"),
    ],
)
def test_quantised_weights_are_named(folder, changes, beside, named):
    set_keys(folder, **changes)
    if beside:
        write(folder, beside, bits=4)
    message = refused(folder)
    file = folder / (beside or "config.json")
    assert message.startswith(f"{file}: the weights are quantised with {named}; ")
    assert "use the unquantised model" in message


def test_which_of_two_models_in_a_folder_is_read(folder, caplog):
    expected = load_params(folder, read_config(folder))
    tensors = load_file(folder / WHOLE)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(other, folder / "model-00001-of-00001.safetensors")
    write(folder, INDEX, weight_map=dict.fromkeys(other, "model-00001-of-00001.safetensors"))
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    found = load_params(folder, read_config(folder))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert f"{WHOLE} is read, as in transformers, and not the files that {INDEX}" in caplog.text
    assert "the safetensors are read; to read tiny.gguf, give that file" in caplog.text


def test_two_models_without_an_index_are_refused(folder):
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).rename(folder / "one.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "two.safetensors")
    message = (
        "in one.safetensors, two.safetensors.*; if these are several models, give each a folder"
    )
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_an_encoder_and_unsupported_keys_name_the_file(folder):
    config = folder / "config.json"
    shutil.copy(config, folder / "as_it_was.json")
    set_keys(folder, model_type="bert")
    assert refused(folder).startswith(f"{config}: model_type='bert' is not supported (an encoder")
    shutil.copy(folder / "as_it_was.json", config)
    set_keys(folder, is_encoder_decoder=True)
    assert refused(folder).startswith(f"{config} of the model (LlamaConfig) has unsupported keys")
