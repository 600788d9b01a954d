"""What the README of the models says runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from tiny_models import write_tiny_folder

from conlens_jax.models.families import _BY_MODEL_TYPE

README = Path(__file__).parents[1] / "conlens_jax" / "models" / "README.md"


def test_the_example_runs(tmp_path, capsys):
    write_tiny_folder(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(code.replace("path/to/folder", str(tmp_path)), names)
    np.testing.assert_array_equal(names["last"], names["same"])
    assert names["every"].shape == (1, 3, len(names["tokens"][0]), 32)
    np.testing.assert_array_equal(
        names["every"][:, 1, -1], names["model"].capture(names["tokens"], 0, -1)
    )
    assert names["logits"].shape == (1, len(names["tokens"][0]), 48)
    assert names["ids"].shape == (2, 8) and names["drawn"].shape == (1, 8)
    assert capsys.readouterr().out.strip()


def test_the_table_names_every_family():
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named - {"model_type"} == set(_BY_MODEL_TYPE)
