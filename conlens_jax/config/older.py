"""Recorded configurations of older versions, as this version spells them.

``lens.estimator`` and ``lens.history_gradient`` once contained a number (``"rloo=4"``,
``"sweeps=2"``), which is a field of its own today. Records that have the new field are of this
version and stay as they are: what the command line gives has every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NUMBER_FIELDS = {"estimator": "estimator_samples", "history_gradient": "history_sweeps"}
"""Fields of the lens that once contained a number, and the field that has it today."""


def updated(values: Mapping[str, Any]) -> dict[str, Any]:
    """A whole configuration."""
    values = dict(values.items())
    if hasattr(values.get("lens"), "items"):
        values["lens"] = updated_lens(values["lens"])
    return values


def updated_lens(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``lens``."""
    fields = dict(fields.items())
    for name, number_name in NUMBER_FIELDS.items():
        kind, _, number = str(fields.get(name, "")).partition("=")
        if number.isdigit() and number_name not in fields:
            fields |= {name: kind, number_name: int(number)}
    return fields
