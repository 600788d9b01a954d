"""The language model inside a model that also reads images (or hears).

For text alone, each type below computes what its language model computes. Its files are read as
that model: the keys of ``text_config``, and the tensors of the language model under their names
there (see :data:`RENAMES`). Types whose text part is another function, such as one that attends in
both directions to a prompt, are not listed. A model is saved as a text model.

Source: transformers' ``modeling_<type>.py``, ``configuration_<type>.py`` and
``conversion_mapping.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conlens_jax.models.hf_config import parse_token_ids

# The type of the language model where text_config does not say it.
WHOLES = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "idefics3": "llama",
    "internvl": "qwen2",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "smolvlm": "llama",
    "vipllava": "llama",
}
_TIED = {"gemma3", "gemma4", "gemma4_unified", "internvl", "mistral3"}
"""Those that tie the output head to the embedding where no key says it."""
_QWEN2_VL = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
_GEMMA4_UNIFIED = {
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
}
# Types that are the family named here with other defaults. Those of Qwen have a rotation by time,
# height and width of an image: all three of a text's token are its position.
_SAME_FOR_TEXT = {
    "gemma4_unified_text": ("gemma4_text", _GEMMA4_UNIFIED),
    "qwen2_vl_text": ("qwen2", _QWEN2_VL),
    "qwen2_5_vl_text": ("qwen2", _QWEN2_VL),
    "qwen3_vl_text": ("qwen3", {"max_position_embeddings": 128_000, "rope_theta": 500_000.0}),
}
_OUTSIDE = ("bos_token_id", "eos_token_id", "quantization_config")

# Names of tensors on the hub, and in transformers v5's memory.
RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model."),
    (r"^model\.(language_model|text_model)\.", "model."),
)
IGNORED = (
    r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|connector)\..*",
    r"(model\.)?(audio_tower|embed_vision|embed_audio|vision_embedder)\..*",
    r"(model\.)?image_newline",
)


def text_part(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the language model inside a model of a type in :data:`WHOLES`; other
    values as they are.

    Raises:
      ValueError: there is no ``text_config``.
    """
    whole = values.get("model_type")
    if whole in WHOLES:
        values = _inner(values, whole)
    if values.get("model_type") in _SAME_FOR_TEXT:
        family, defaults = _SAME_FOR_TEXT[values["model_type"]]
        values = defaults | _one_position(values) | {"model_type": family}
    return values


def _inner(values: Mapping[str, Any], whole: str) -> dict[str, Any]:
    text = values.get("text_config")
    if text is None and WHOLES[whole] in _SAME_FOR_TEXT:
        # Older files of these have its keys beside those of the rest.
        text = {key: value for key, value in values.items() if not _of_images(key)}
    if not isinstance(text, dict):
        raise ValueError(f"config.json: model_type={whole!r} needs text_config, which is {text!r}")
    outside = {key: values[key] for key in _OUTSIDE if values.get(key) is not None}
    ends = [
        token
        for part in (outside, text)
        for token in parse_token_ids(part.get("eos_token_id"), "eos_token_id")
    ]
    tied = values.get("tie_word_embeddings", whole in _TIED) or text.get("tie_word_embeddings")
    return (
        {"model_type": WHOLES[whole]}
        | outside
        | text
        | ({"model_type": WHOLES[whole]} if text.get("model_type") in (None, whole) else {})
        | ({"eos_token_id": list(dict.fromkeys(ends))} if ends else {})
        | {"tie_word_embeddings": bool(tied)}
    )


def _of_images(key: str) -> bool:
    return key.startswith(("vision_", "image_", "video_"))


def _one_position(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that divide a rotation between time, height and width."""
    plain = dict(values)
    for key in ("rope_scaling", "rope_parameters"):
        if rope := values.get(key):
            rope = {
                k: v for k, v in rope.items() if k not in ("mrope_section", "mrope_interleaved")
            }
            plain[key] = {k: "default" if v == "mrope" else v for k, v in rope.items()}
    return plain
