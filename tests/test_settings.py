"""The documentation of the settings: one comment per field, and no name that is not a field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap

import pytest

from conlens_jax import config
from conlens_jax.config import ExperimentConfig, OptimizerConfig, ScheduleConfig, field_names

FIELDS = set(field_names())
SECTIONS = {name.partition(".")[0] for name in FIELDS}


def every_class() -> list[type]:
    found = [value for name, value in vars(config).items() if name.endswith("Config")]
    assert {ExperimentConfig, ScheduleConfig, OptimizerConfig} < set(found)
    return found


def is_section(field: ast.AnnAssign) -> bool:
    """A section's documentation is that of its class; a schedule is a value."""
    kind = ast.unparse(field.annotation)
    return kind.endswith("Config") and kind != "ScheduleConfig"


@pytest.mark.parametrize("kind", every_class(), ids=lambda kind: kind.__name__)
def test_every_field_has_a_comment(kind):
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    fields = [entry for entry in node.body if isinstance(entry, ast.AnnAssign)]
    assert {field.target.id for field in fields} == {f.name for f in dataclasses.fields(kind)}
    assert ast.get_docstring(node)
    for field in fields:
        above = lines[field.lineno - 2].strip().startswith("# ")
        beside = re.search(r"  # \S", lines[field.lineno - 1])
        assert above or beside or is_section(field), field.target.id


@pytest.mark.parametrize("kind", every_class(), ids=lambda kind: kind.__name__)
def test_every_name_in_the_documentation_is_a_field(kind):
    source = inspect.getsource(kind)
    own = {field.name for field in dataclasses.fields(kind)}
    for name in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_0-9.]*\w", source):
        assert name in FIELDS, name
    for name in re.findall(r"``([a-z_0-9]+)``", kind.__doc__):
        assert name in own, name
    # A list of arguments names what the comments already do.
    assert "Attributes:" not in kind.__doc__
