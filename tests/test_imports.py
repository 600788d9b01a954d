"""Imports run one way: from the entry points down to the files and the configuration."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import conlens_jax

ROOT = Path(conlens_jax.__file__).parent
# A folder may import those before it. The entry points, which lie in no folder, import any.
ORDER = (
    "files config parallel tracking models lens corpora data embedded measurement training "
    "evaluation inspection nla explorer planning"
).split()
MODULES = {
    ".".join(("conlens_jax", *file.relative_to(ROOT).with_suffix("").parts)): file
    for file in sorted(ROOT.rglob("*.py"))
    if file.name != "__init__.py"
}


def imported(module: str) -> set[str]:
    """The modules of the package that a module imports, inside functions and for types too."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


def level(module: str) -> int:
    folder = module.split(".")[1] if module.count(".") > 1 else ""
    return ORDER.index(folder) if folder else len(ORDER)


def test_every_folder_has_its_place():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_a_file_run_one_way(module):
    upwards = {name for name in imported(module) if level(name) > level(module)}
    assert not upwards


def test_no_circle_of_files():
    graph = {module: imported(module) for module in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)
