"""Model folders by name: a local folder, a GGUF file that is converted once, or a hub id that is
downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

from conlens_jax.files.paths import local_path
from conlens_jax.models.from_gguf.folder import folder_of_gguf
from conlens_jax.models.from_gguf.source import gguf_source

# Weights, shapes and tokenizers; nothing that has to be run or unpickled.
_FETCHED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    # What tells an adapter or quantised weights.
    "adapter_config.json",
    "*quant*_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab*",
    "merges.txt",
)
# Repositories keep copies of the weights in other layouts here.
_LEFT_OUT = ("original/*", "onnx/*", "consolidated*", "*/*", "tokenizer*.py")


def resolve_folder(path: str, revision: str = "") -> Path:
    """The local folder of a model: ``path`` itself, the converted folder of a GGUF file (or of the
    only one in a folder, or of a model by name), or the download of a hub id.

    Args:
      revision: commit, tag or branch of a hub id; empty is the branch ``main``. A commit pins the
        weights for good.

    Raises:
      ValueError: neither a folder nor a hub id that can be downloaded; a GGUF file that cannot be
        used.
    """
    if gguf := gguf_source(path):
        return folder_of_gguf(gguf)
    folder = local_path(path)
    if folder.is_dir():
        return folder
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"model.path={path!r}: there is no such folder")
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(
            snapshot_download(
                path,
                revision=revision or None,
                allow_patterns=list(_FETCHED),
                ignore_patterns=list(_LEFT_OUT),
            )
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        at = f" at model.revision={revision!r}" if revision else ""
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if constants.HF_HUB_OFFLINE:
            reason = (
                "HF_HUB_OFFLINE is set and the local cache does not have it; unset that, or "
                f"download it beforehand with `hf download {path}` ({reason})"
            )
        raise ValueError(
            f"model.path={path!r} is not a folder, and could not be downloaded{at}: {reason}"
        ) from error


def commit_of(folder: Path) -> str:
    """The commit of a folder in the hub's cache, empty for any other folder."""
    is_commit = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if is_commit else ""
