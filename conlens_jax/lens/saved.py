"""The folder of a saved lens: where it is, and the trained parts in it.

:mod:`conlens_jax.inspection.folder` writes it and describes its files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import safetensors.flax

from conlens_jax.files.paths import local_path
from conlens_jax.models.param_table import Params, leaf_name, named_leaves

SHIPPED = Path(__file__).parent.parent / "lenses"
"""Lenses that are part of the package, by name."""
CONFIG, METRICS, MODEL_FOLDER = "config.json", "metrics.json", "model"
KIND = "consistency_lens"
"""``model_type`` in ``config.json``."""
SIDES = ("decoder", "encoder")
"""``<side>.safetensors`` has the trained parts of each, named by their path in the tree."""
FINISHED = ".finished-lens"
"""A complete new lens in this folder replaces the one around it."""
_FETCHED = (CONFIG, METRICS, "README.md", "*.safetensors", f"{MODEL_FOLDER}/*")


def is_saved_lens(folder: Path) -> bool:
    """Whether a folder has a lens, by its ``config.json``."""
    put_in_place(folder)
    file = folder / CONFIG
    return file.is_file() and read_json(file).get("model_type") == KIND


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def put_in_place(folder: Path) -> None:
    """Moves a complete new lens (its folder's name marks it) over the older one around it. Several
    files cannot be replaced at once: after a kill in between, the next reader finishes the move."""
    finished = folder / FINISHED
    if not finished.is_dir():
        return
    for file in finished.iterdir():
        if file.is_dir():
            shutil.rmtree(folder / file.name, ignore_errors=True)
        file.replace(folder / file.name)
    model = folder / MODEL_FOLDER
    if model.is_dir() and not any(model.iterdir()):
        model.rmdir()
    finished.rmdir()


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository on the hub, and is no path on this machine."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).exists()


def read_parts(folder: Path, template: Params, expected_by: str = CONFIG) -> Params:
    """The trained parts, with the dtypes and on the shardings of ``template``.

    Args:
      expected_by: for the error: what the template was made from.

    Raises:
      ValueError: parts that are missing, unexpected or of another shape; all are listed.
    """
    stored = {
        f"{side}.{name}": array
        for side in SIDES
        for name, array in safetensors.flax.load_file(folder / f"{side}.safetensors").items()
    }
    expected = named_leaves(template)
    problems = [f"{name} is missing" for name in expected.keys() - stored.keys()]
    problems += [f"{name} is unexpected" for name in stored.keys() - expected.keys()]
    problems += [
        f"{name} has shape {stored[name].shape}, not {expected[name].shape}"
        for name in expected.keys() & stored.keys()
        if stored[name].shape != expected[name].shape
    ]
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in sorted(problems))
        raise ValueError(f"{folder}: the trained parts do not fit {expected_by}:\n{listing}")

    def put(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = stored[leaf_name(path)]
        return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(put, template)


def local_folder(path: str) -> Path | None:
    """The folder that ``path`` is, or that of a lens of this package by its name; None: neither."""
    folder = local_path(path)
    if folder.is_dir():
        return folder
    return SHIPPED / path if path in _shipped() else None


def _shipped() -> list[str]:
    return sorted(folder.name for folder in SHIPPED.iterdir())


def resolve(path: str) -> Path:
    """The folder of a saved lens: a local one (:func:`local_folder`) or the download of a hub id.

    Raises:
      ValueError: none of these.
    """
    if (local := local_folder(path)) is not None:
        return local
    if not is_hub_id(path):
        raise ValueError(
            f"{path!r} is neither a folder, a lens of this package ({', '.join(_shipped())}) nor a "
            "hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, allow_patterns=list(_FETCHED)))
    except Exception as error:  # the hub client raises many types; all mean the same to the user
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise ValueError(
            f"{path!r} is not a folder, and could not be downloaded from the hub: {reason}"
        ) from error
    if not is_saved_lens(folder):
        raise ValueError(f"{path!r} on the hub is no lens (by its config.json)")
    return folder
