"""Models that also read images: their text part is the whole model's function of text."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from tiny_models import random_tokens

from conlens_jax.models.families import config_from_hf, text_parts
from conlens_jax.models.hf_io import load_params, read_config
from conlens_jax.models.transformer import forward

_TEXT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_IMAGES = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1}
_QWEN_IMAGES_2 = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 20}
_ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}


def _of(text: str, vision: str, images: Any = None, **changes: Any) -> dict[str, Any]:
    vision = _IMAGES | {"model_type": vision} | (images or {})
    return {"text_config": _TEXT | {"model_type": text}, "vision_config": vision} | changes


# config.json of a tiny model of each type.
CASES: dict[str, dict[str, Any]] = {
    "gemma3": _of("gemma3_text", "siglip_vision_model", mm_tokens_per_image=4),
    "gemma4": {
        "text_config": _TEXT
        | {"head_dim": 4, "global_head_dim": 8, "num_hidden_layers": 3, "rms_norm_eps": 0.1}
        | {"layer_types": ["sliding_attention", *["full_attention"] * 2]}
        | {"num_kv_shared_layers": 1, "use_double_wide_mlp": True}
        | {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 48},
        "vision_config": {key: value for key, value in _IMAGES.items() if key != "image_size"}
        | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 8},
        "audio_config": None,
    },
    "gemma4_unified": {
        "text_config": _TEXT
        | {"head_dim": 4, "global_head_dim": 8, "rms_norm_eps": 0.1, "attention_k_eq_v": True}
        | {"num_global_key_value_heads": 1}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 32},
        "audio_config": None,
    },
    "idefics3": _of("llama", "idefics3_vision", scale_factor=1),
    "internvl": _of(
        "qwen2", "internvl_vision", images={"image_size": [8, 8], "patch_size": [4, 4]}
    ),
    "llava": _of("llama", "clip_vision_model"),
    "llava_next": _of("mistral", "clip_vision_model"),
    "llava_onevision": _of("qwen2", "siglip_vision_model", tie_word_embeddings=True),
    "mistral3": _of("mistral", "pixtral", images={"head_dim": 8}),
    "qwen2_5_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROPE},
        "vision_config": _QWEN_IMAGES | _QWEN_IMAGES_2,
    },
    "qwen2_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROPE},
        "vision_config": _QWEN_IMAGES | {"embed_dim": 16, "hidden_size": 32},
    },
    "qwen3_vl": {
        "text_config": _TEXT
        | {"head_dim": 8, "rope_parameters": _ROPE | {"mrope_interleaved": True}},
        "vision_config": _QWEN_IMAGES
        | _QWEN_IMAGES_2
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "smolvlm": _of("llama", "smolvlm_vision", scale_factor=1),
    "vipllava": _of("llama", "clip_vision_model"),
}


@pytest.mark.parametrize("whole", text_parts.WHOLES)
def test_the_text_part_computes_what_the_whole_does_for_text(whole, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    hf = AutoConfig.for_model(whole, **CASES[whole])
    model = AutoModelForImageTextToText.from_config(hf, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.tied_embeddings == hf.tie_word_embeddings
    tokens = random_tokens(2, 12)
    logits = forward(load_params(tmp_path, config), tokens, config=config)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("whole", text_parts.WHOLES)
def test_absent_keys_take_the_defaults_of_transformers(whole):
    pytest.importorskip("torch")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = text_parts.WHOLES[whole]
    ours = config_from_hf({"model_type": whole, "text_config": {"model_type": kind}})
    text = CONFIG_MAPPING[kind]().to_dict()
    tied = CONFIG_MAPPING[whole].tie_word_embeddings
    theirs = {"model_type": whole, "text_config": text, "tie_word_embeddings": tied}
    assert ours == config_from_hf(theirs)


def test_older_files_of_qwen_have_all_keys_on_one_level():
    text = _TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    beside = {"vision_config": {"depth": 1}, "image_token_id": 40, "vision_token_id": 41}
    nested = {"model_type": "qwen2_5_vl", "text_config": text | {"rope_theta": 500.0}}
    flat = {"model_type": "qwen2_5_vl", **text, "rope_theta": 500.0, **beside}
    assert config_from_hf(flat) == config_from_hf(nested | beside)
    plain = config_from_hf(_TEXT | {"model_type": "qwen2", "rope_theta": 500.0})
    assert dataclasses.replace(config_from_hf(flat), norm_eps=plain.norm_eps) == plain


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llava"}, "'llava' needs text_config"),
        ({"model_type": "llava", "text_config": {"model_type": "mamba"}}, "of type 'mamba'"),
        ({"model_type": "paligemma", "text_config": {"model_type": "gemma"}}, "several kinds"),
        ({"model_type": "bert"}, r"'bert' .* \(an encoder: it reads in both directions"),
        ({"model_type": "t5"}, r"'t5' .* \(an encoder with a decoder"),
        ({"model_type": "fsmt", "is_encoder_decoder": True}, "an encoder with a decoder"),
        ({"model_type": "mamba", "auto_map": {"AutoConfig": "x.Config"}}, "never run"),
        ({"model_type": "mamba"}, r"'mamba' is not supported; known families: gpt2"),
        ({}, "model_type=None is not supported"),
    ],
)
def test_other_kinds_of_model_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(values)
