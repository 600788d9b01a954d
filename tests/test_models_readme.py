"""The README of the models names what there is (test_documents runs its code)."""

from __future__ import annotations

import re
from pathlib import Path

from conlens_jax.models.families import _BY_MODEL_TYPE

README = Path(__file__).parents[1] / "conlens_jax" / "models" / "README.md"


def test_the_table_names_every_family():
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named - {"model_type"} == set(_BY_MODEL_TYPE)
