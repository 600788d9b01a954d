"""GGUF files: each family's logits and tokens, what cannot be used, and the cache of folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from family_cases import CASES
from tiny_models import hf_forward, hf_model, random_tokens

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")

from gguf_writing import (  # noqa: E402
    ARCHITECTURES,
    K_QUANTS,
    TOKENIZER,
    converted,
    write_gguf,
)

from conlens_jax import load_model  # noqa: E402
from conlens_jax.models.families import FAMILIES  # noqa: E402
from conlens_jax.models.hub import resolve_folder  # noqa: E402

TEXT = "the fox in the an ox."
# gpt-neo is no architecture of llama.cpp; Mistral's files are Llama's.
NO_GGUF = {"gpt_neo", "mistral"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CONLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def transformers_reading(path: Path):
    """The model as transformers reads a GGUF file. (Its ``from_pretrained`` needs a package more
    for that.)"""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(**load_gguf_checkpoint(path)["config"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.float()


def written(folder: Path, family: str, kind: str = "F32", **changes):
    """A tiny model of transformers, and its GGUF file."""
    model = hf_model(family, **changes)
    model.save_pretrained(folder / "hf")
    values, tensors = converted(family, folder / "hf")
    path = folder / "tiny.gguf"
    return model, write_gguf(path, ARCHITECTURES[family], values, tensors, kind=kind)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return written(folder, "llama")[1]


def logits_of(path: Path, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(load_model(path).logits(tokens))


def test_every_family_is_a_case():
    assert FAMILIES.keys() <= ARCHITECTURES.keys() | NO_GGUF


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_each_family_computes_the_same(family, tmp_path):
    """As the model that was written; for the quantised ones see below."""
    changes = {"hidden_act": "gelu"} if family == "gpt_neox" else {}
    if family.startswith("gemma"):  # not in the file: llama.cpp knows it
        changes = {"query_pre_attn_scalar": 12}
    if family == "qwen2":
        changes = {"use_sliding_window": False}
    if family == "qwen3_moe":
        changes = {"norm_topk_prob": True}
    if family == "gpt_oss":
        changes = {"swiglu_limit": 7.0}
    model, path = written(tmp_path, family, **changes)
    tokens = random_tokens(2, 24)
    expected, _ = hf_forward(model, tokens)
    np.testing.assert_allclose(logits_of(path, tokens), expected, rtol=0, atol=CASES[family].atol)
