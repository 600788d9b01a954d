"""The sidecar of an NLA model: ``nla_meta.yaml``, which describes its role, layer and prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

SIDECAR = "nla_meta.yaml"
VALUE_HEAD = "value_head.safetensors"
# Each role and its name in the other dialect.
_DIALECTS = {"av": "actor", "ar": "critic"}


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The content of an ``nla_meta.yaml``.

    Attributes:
      role: ``"av"`` or ``"ar"``, in either dialect.
      layer: the block whose output is explained.
      d_model: its width.
      template: the prompt, with ``{injection_char}`` or ``{explanation}``.
      injection_char, injection_token_id, injection_scale: of an AV.
    """

    role: str
    layer: int
    d_model: int
    template: str
    injection_char: str = ""
    injection_token_id: int = -1
    injection_scale: float = 0.0


def read_sidecar(folder: Path, role: str) -> Sidecar:
    """Reads and checks the sidecar in ``folder``.

    Raises:
      ValueError: it is missing or not of this role; all problems are listed.
    """
    file = folder / SIDECAR
    if not file.is_file():
        raise ValueError(f"{folder} has no {SIDECAR}, so it is no half of an NLA pair")
    values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    problems: list[str] = []
    names = (role, _DIALECTS[role])
    if values.get("role") not in names:
        problems.append(f"role is {values.get('role')!r}, not {' or '.join(names)}")

    def required(*path: str) -> Any:
        value = functools.reduce(
            lambda part, key: part.get(key) if isinstance(part, Mapping) else None, path, values
        )
        if value is None:
            problems.append(f"{'.'.join(path)} is missing")
        return value

    templates = values.get("prompt_templates") or {}
    template = templates.get(names[0]) or templates.get(names[1])
    if template is None:
        problems.append(f"prompt_templates.{role} is missing")
    fields: dict[str, Any] = {
        "layer": required("extraction_layer_index"),
        "d_model": required("d_model"),
    }
    if role == "av":
        fields |= {
            "injection_char": required("tokens", "injection_char"),
            "injection_token_id": required("tokens", "injection_token_id"),
            "injection_scale": required("extraction", "injection_scale"),
        }
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}")
    if fields.get("injection_scale") == "sqrt_d_model":
        fields["injection_scale"] = fields["d_model"] ** 0.5
    return Sidecar(role=role, template=template, **fields)
