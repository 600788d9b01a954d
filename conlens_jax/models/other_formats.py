"""Folders that are not a model as it is read here: what they are, and what to do with them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conlens_jax.models.mxfp4 import MXFP4
from conlens_jax.models.weight_files import INDEX_FILE, WHOLE_FILE, indexed_files, read_json

_warn_once = functools.cache(logging.getLogger(__name__).warning)
ADAPTER_FILE = "adapter_config.json"
# How a config.json and the files beside it say that weights are quantised.
_SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_NAMES = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "mlx": "MLX",
    "modelopt": "ModelOpt",
}


def check_folder(folder: Path) -> None:
    """Raises ValueError for a folder with an adapter only. The log says which model is read of
    several, and that one beside an adapter is read without it."""
    models = [
        file.name
        for pattern in ("*.safetensors", "pytorch_model*.bin")
        for file in folder.glob(pattern)
        if not file.name.startswith("adapter_")
    ]
    if (folder / ADAPTER_FILE).exists():
        if not models:
            raise ValueError(_how_to_merge(folder))
        _warn_once("%s: the model is read without the adapter of %s", folder, ADAPTER_FILE)
    if WHOLE_FILE in models and set(indexed_files(folder).values()) & set(models) - {WHOLE_FILE}:
        _warn_once(
            "%s: %s is read, as in transformers, and not the files that %s names",
            folder,
            WHOLE_FILE,
            INDEX_FILE,
        )
    if models and (gguf := min((file.name for file in folder.glob("*.gguf")), default="")):
        _warn_once("%s: the safetensors are read; to read %s, give that file", folder, gguf)


def _how_to_merge(folder: Path) -> str:
    adapter = read_json(folder / ADAPTER_FILE)
    return (
        f"model.path={folder} is an adapter ({adapter.get('peft_type', 'LoRA')}) of the model "
        f"{adapter.get('base_model_name_or_path')!r}, not a model. Merge it into that model, with "
        "the package peft:\n"
        '  python -c "from peft import AutoPeftModelForCausalLM as Model; '
        f"Model.from_pretrained('{folder}').merge_and_unload().save_pretrained('merged')\"\n"
        "copy that model's tokenizer files to it, and give the new folder"
    )


def refuse_quantised(values: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError for weights that are stored in a format with few bits, other than mxfp4.

    Args:
      values: of the config.json ``file``.
    """
    text = values.get("text_config") or {}
    for part in (values, text):
        settings = part.get("quantization_config") or part.get("compression_config")
        if settings and (method := _method(settings)) != MXFP4:
            raise ValueError(_quantised(file, method))
        if isinstance(part.get("quantization"), dict):
            raise ValueError(_quantised(file, "mlx"))
    for name, method in _SIDE_FILES.items():
        if file.name == "config.json" and file.with_name(name).exists():
            raise ValueError(_quantised(file.with_name(name), method))


def _method(settings: Mapping[str, Any]) -> str:
    if any(key.startswith(("load_in_", "bnb_", "_load_in_")) for key in settings):
        return settings.get("quant_method", "bitsandbytes")
    return settings.get("quant_method", "unknown")


def _quantised(file: Path, method: str) -> str:
    return (
        f"{file}: the weights are quantised with {_NAMES.get(method, method)}; "
        f"quant_method={method!r} is not supported (only {MXFP4} is); use the unquantised model, "
        "with model.quantise='int8' to save memory"
    )
