"""The notebook and the documents' code run as they stand, on a tiny lens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pipeline import quick_compilation
from tiny_user import tiny_user_lens

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "scripts" / "notebooks" / "explore.ipynb"
# A Python block of a document runs in this test where this stands on the line before it.
RUNNABLE = re.compile(r"<!-- runnable -->\n```python\n(.*?)```", re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the documents speak of: ``path/to/folder``, a model, and
    ``runs/quickstart``, a lens."""
    with quick_compilation(tmp_path_factory):
        root = tmp_path_factory.mktemp("place")
        (root / "path" / "to").mkdir(parents=True)
        tiny_user_lens(root / "path" / "to" / "folder").save(root / "runs" / "quickstart")
        yield root


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_runnable_blocks_run(place, document, monkeypatch):
    """In one file, one after the other."""
    monkeypatch.chdir(place)
    names: dict = {}
    blocks = RUNNABLE.findall(document.read_text(encoding="utf-8"))
    for block in blocks:
        exec(compile(block, f"{document.name}: {block.splitlines()[0]}", "exec"), names)
    assert blocks or document.name != "README.md"


def test_notebook_runs(place, monkeypatch):
    pytest.importorskip("pandas")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(place)
    monkeypatch.setenv("CONLENS_CHECKPOINT", str(place / "runs" / "quickstart"))
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not kept in the repository"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert (place / "explained.html").is_file()
    assert len(names["best"]) == 8 and names["best"][-1] <= names["best"][0]
