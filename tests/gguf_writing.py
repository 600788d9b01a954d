"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

gguf = __import__("pytest").importorskip("gguf")
Kind = gguf.GGMLQuantizationType

ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "gpt2")},
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss",
    **{name: name for name in ("gemma", "olmo", "smollm3", "granite", "starcoder2", "stablelm")},
    **{name: name for name in ("nemotron", "falcon", "glm4", "olmoe")},
    "olmo3": "olmo2",
    "ministral3": "mistral3",
    "phi": "phi2",
}
"""GGUF's architecture of a family."""
LAYER_NORMED = {"gpt2", "gpt_neox", "olmo", "phi", "starcoder2", "stablelm", "nemotron", "falcon"}
PERMUTED = ("llama", "mixtral", "olmo", "smollm3", "granite", "ministral3")
# Values that a file has under another name.
_SAME = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "clip_qkv": "attention.clamp_kqv",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
LEGACY_QUANTS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Where the blocks of a K-quant have their fp16 scales, in bytes.
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
_SCALE = {"Q2_K": 4e-4, "Q3_K": 2e-4, "Q4_K": 4e-5, "Q5_K": 2e-5, "Q6_K": 1e-5}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = ["t h", "th e", "Ġ a", "Ġ the", "i n", "a n", "Ġ f", "o x", "Ġf ox", "Ġ o"]
TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", *LETTERS, "Ġ", "."]
TOKENS += [merge.replace(" ", "") for merge in MERGES]
TOKENS += [f"[PAD{id}]" for id in range(len(TOKENS), 48)]
TOKENIZER: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": TOKENS,
    "token_type": [3] * 4 + [1] * 38 + [5] * 6,
    "merges": MERGES,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 3,
    "padding_token_id": 0,
}
"""Of a tiny model; the keys without ``tokenizer.ggml.``."""


def write_gguf(
    path: Path,
    architecture: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    kind: str = "F32",
    tokenizer: Mapping[str, Any] = TOKENIZER,
    template: str = "",
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a file.

    Args:
      values: the metadata, without the architecture's prefix.
      tensors: by GGUF's names; matrices are stored as ``kind``.
      tokenizer: metadata, without ``tokenizer.ggml.``.
      more: further metadata, by whole keys.
    """
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {f"{architecture}.{key}": value for key, value in values.items()}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    metadata |= more or {}
    for key, value in metadata.items():
        _add(writer, key, value)
    if template:
        writer.add_chat_template(template)
    for name, array in tensors.items():
        if array.ndim == 1:
            writer.add_tensor(name, array.astype(np.float32))
        else:
            stored = quantised(array, kind)
            writer.add_tensor(name, stored, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def quantised(array: np.ndarray, kind: str) -> np.ndarray:
    """The stored form of an array. What ``gguf`` cannot quantise is random blocks, whose scales
    make them about as large as the array."""
    if kind not in K_QUANTS:
        return gguf.quantize(array, Kind[kind])
    block, block_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(array.size)
    blocks = rng.integers(0, 256, (array.size // block, block_bytes), np.uint8)
    for at in _SCALES[kind]:
        blocks[:, at : at + 2] = np.array([_SCALE[kind]], np.float16).view(np.uint8)
    return blocks.reshape(*array.shape[:-1], -1)


def converted(family: str, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata and tensors of a tiny model that transformers saved in ``folder``."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).to_dict()
    tensors = dict(_renamed(family, config, load_file(folder / "model.safetensors")))
    tensors |= _rope_tensors(config.get("rope_parameters") or {}, config.get("head_dim"))
    return {**_values(family, config), "block_count": _n_layers(config)}, tensors


def _n_layers(config: Mapping[str, Any]) -> int:
    return config.get("num_hidden_layers") or config["n_layer"]


def _values(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    get = lambda *names: next(config[name] for name in names if config.get(name) is not None)
    heads, width = get("num_attention_heads", "n_head"), get("hidden_size", "n_embd")
    values: dict[str, Any] = {
        "embedding_length": width,
        "attention.head_count": heads,
        "feed_forward_length": get("intermediate_size", "n_inner", "ffn_hidden_size"),
        "context_length": get("max_position_embeddings", "n_positions"),
    }
    if family in LAYER_NORMED:
        names = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
        values["attention.layer_norm_epsilon"] = 1e-5 if family == "olmo" else get(*names)
    else:
        values["attention.layer_norm_rms_epsilon"] = get("rms_norm_eps")
    if family not in ("gpt2", "gpt_neox"):
        values["attention.head_count_kv"] = get("num_key_value_heads", "num_kv_heads")
    if family == "falcon" and not config["new_decoder_architecture"]:
        values["attention.head_count_kv"] = 1
    if family == "gpt2":
        return values
    rope = get("rope_parameters")
    rope = rope.get("full_attention", rope)
    head_dim = config.get("head_dim") or width // heads
    values["rope.freq_base"] = float(rope["rope_theta"])
    values["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if config.get("head_dim"):
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if (kind := rope.get("rope_type")) in ("yarn", "linear"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn" or family == "phi3":
        length = rope.get("original_max_position_embeddings") or get("max_position_embeddings")
        values["rope.scaling.original_context_length"] = length
    if kind == "longrope":
        scale = values["context_length"] / length
        attention = math.sqrt(1 + math.log(scale) / math.log(length))
        values["rope.scaling.attn_factor"] = attention
    if family in ("gemma2", "gemma3_text", "gpt_oss", "phi3"):
        values["attention.sliding_window"] = config.get("sliding_window") or 0
    if family == "gemma3_text":
        pattern = [kind == "sliding_attention" for kind in config["layer_types"]]
        values["attention.sliding_window_pattern"] = pattern
        local = config["rope_parameters"]["sliding_attention"]
        values["rope.freq_base_swa"] = float(local["rope_theta"])
    if family == "olmo3":
        values["attention.sliding_window"] = get("sliding_window")
        pattern = [kind == "sliding_attention" for kind in config["layer_types"]]
        values["attention.sliding_window_pattern"] = pattern
    if family == "ministral3":
        values["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"]
        values["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
    for key, name in _SAME.items():
        if config.get(key):
            values[name] = config[key]
    if family in ("gpt_neox", "stablelm"):
        values["use_parallel_residual"] = get("use_parallel_residual")
    if family in ("mixtral", "qwen3_moe", "gpt_oss", "olmoe"):
        values["expert_count"] = get("num_local_experts", "num_experts")
        values["expert_used_count"] = get("num_experts_per_tok")
    if family in ("qwen3_moe", "gpt_oss"):
        values["expert_feed_forward_length"] = get("moe_intermediate_size", "intermediate_size")
    return values


def _rope_tensors(rope: Mapping[str, Any], head_dim: int) -> dict[str, np.ndarray]:
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"])
            for name in ("short", "long")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    factor, low, high = (rope[f"{name}factor"] for name in ("", "low_freq_", "high_freq_"))
    length, divisors = rope["original_max_position_embeddings"], []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    assert len(set(divisors)) > 2
    return {"rope_freqs.weight": np.array(divisors)}


def _renamed(
    family: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """What llama.cpp's converter makes of each tensor."""
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[ARCHITECTURES[family]], _n_layers(config))
    rename = lambda name: names.get_name(name, (".weight", ".bias"))
    experts: dict[str, list[np.ndarray]] = {}
    heads, kv_heads = (config.get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
    for name in sorted(tensors, key=_by_number):
        array = tensors[name]
        if name.endswith((".attn.bias", ".masked_bias", "inv_freq")):
            continue
        if found := re.search(r"\.experts\.\d+\.", name):
            experts.setdefault(name.replace(found[0], ".experts."), []).append(array)
            continue
        if found := re.search(r"layernorm\.norms\.\d+\.", name):
            experts.setdefault(name.replace(found[0], "layernorm."), []).append(array)
            continue
        if family in PERMUTED and (part := re.search(r"\.([qk])_proj\.", name)):
            n = heads if part[1] == "q" else kv_heads
            halves = array.reshape(n, 2, len(array) // n // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if family.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
            array = array + 1
        if family == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
            array = array.T
        if family == "gpt_neox" and ".query_key_value." in name:
            by_head = array.reshape(heads, 3, -1, *array.shape[1:])
            array = by_head.swapaxes(0, 1).reshape(array.shape)
        if family == "falcon" and ".query_key_value." in name:
            groups = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
            by_group = array.reshape(groups, heads // groups + 2, -1, *array.shape[1:])
            parts = by_group[:, :-2], by_group[:, -2], by_group[:, -1]
            array = np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])
        if family == "gpt_oss" and (own := _gpt_oss(name, array)):
            yield from own
        else:
            yield rename(name), np.ascontiguousarray(array)
    for name, parts in experts.items():
        yield rename(name), np.stack(parts)


def _by_number(name: str) -> list[str]:
    """Experts in their order."""
    return [part.zfill(5) for part in name.split(".")]


def _gpt_oss(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    block = "blk." + (re.findall(r"\d+", name) or ["?"])[0]
    outputs_first = lambda part: np.ascontiguousarray(part.swapaxes(-1, -2))
    if name.endswith("sinks"):
        return [(f"{block}.attn_sinks.weight", array)]
    if name.endswith("gate_up_proj"):
        halves = {"gate": array[..., ::2], "up": array[..., 1::2]}
        return [(f"{block}.ffn_{k}_exps.weight", outputs_first(v)) for k, v in halves.items()]
    if name.endswith("gate_up_proj_bias"):
        halves = {"gate": array[..., ::2], "up": array[..., 1::2]}
        return [(f"{block}.ffn_{k}_exps.bias", np.ascontiguousarray(v)) for k, v in halves.items()]
    if name.endswith("down_proj"):
        return [(f"{block}.ffn_down_exps.weight", outputs_first(array))]
    if name.endswith("down_proj_bias"):
        return [(f"{block}.ffn_down_exps.bias", array)]
    return []
