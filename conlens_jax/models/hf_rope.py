"""Rotary embeddings in a config.json, in both spellings: ``rope_parameters`` of transformers v5,
``rope_theta`` and ``rope_scaling`` of v4."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from conlens_jax.models.hf_config import FULL, SLIDING, HFConfigReader
from conlens_jax.models.rope import yarn_scale
from conlens_jax.models.transformer_config import RopeConfig, TransformerConfig

_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    },
    "proportional": {"factor"},
}
_NEEDED = {"factor", "short_factor", "long_factor"}


def read_rope(
    read: HFConfigReader,
    max_positions: int,
    *,
    theta: float = 10_000.0,
    fraction: float | None = None,
    scaling: Mapping[str, Any] | None = None,
    original_max_positions: int | None = None,
    synonyms: Mapping[str, str] | None = None,
    others: Collection[str] = (),
) -> RopeConfig:
    """The rotation of all layers.

    Args:
      theta, fraction, scaling: defaults of keys that the file lacks; ``fraction`` is None if the
        family rotates whole heads only.
      original_max_positions: of a family with this key outside ``rope_parameters``, where it
        overrides the one inside.
      synonyms: the family's own names of kinds.
      others: keys in ``rope_parameters`` that are none of the rotation's.
    """
    given = read("rope_scaling", None) or read("rope_parameters", None)
    read.read_keys.update(("rope_scaling", "rope_parameters"))
    given = {k: v for k, v in (given or scaling or {}).items() if k not in others}
    given.setdefault("rope_theta", read("rope_theta", None) or theta)
    if fraction is not None:
        given.setdefault("partial_rotary_factor", read("partial_rotary_factor", None) or fraction)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given["rope_type"] = (synonyms or {}).get(kind, kind)
    if original_max_positions is not None and "original_max_position_embeddings" in _KEYS.get(
        given["rope_type"], ()
    ):
        given["original_max_position_embeddings"] = original_max_positions
    return parse_rope(read, given, max_positions, partial=fraction is not None)


def read_ropes(
    read: HFConfigReader, max_positions: int, *, theta: float, local_theta: float | None = None
) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of layers without a window and of those with one. A scaling outside
    ``rope_parameters`` is that of the layers without.

    Args:
      theta: default of the former.
      local_theta: of the latter where ``rope_parameters`` has none; None: that of the former.
    """
    given = read("rope_parameters", None) or {}
    whole, local = dict(given.get(FULL) or {}), dict(given.get(SLIDING) or {})
    if given and not (whole or local):
        read.problems.append(f"rope_parameters={given!r} must have {FULL!r} and {SLIDING!r}")
    whole |= read("rope_scaling", None) or {}
    theta = read("rope_theta", None) or theta
    whole.setdefault("rope_theta", theta)
    local.setdefault("rope_theta", local_theta or theta)
    return parse_rope(read, whole, max_positions), parse_rope(read, local, max_positions)


def parse_rope(
    read: HFConfigReader,
    given: Mapping[str, Any],
    max_positions: int,
    *,
    partial: bool = False,
    proportional: bool = False,
) -> RopeConfig:
    """One dict of ``rope_parameters``; problems go to the reader.

    Args:
      partial: whether the family has rotations of a part of the head.
      proportional: whether it has that kind, which always tells a part.
    """
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    theta, fraction = given.pop("rope_theta"), float(given.pop("partial_rotary_factor", 1.0))
    known = _KEYS.keys() - (set() if proportional else {"proportional"})
    if fraction != 1.0 and not partial and not (proportional and kind == "proportional"):
        read.problems.append(f"partial_rotary_factor={fraction} is not supported")
    if kind not in known:
        listed = ", ".join(name for name in _KEYS if name in known)
        read.problems.append(f"rope type {kind!r}: known are {listed}")
        return RopeConfig()
    if unknown := set(given) - _KEYS[kind]:
        read.problems.append(f"rope type {kind!r} does not know {', '.join(sorted(unknown))}")
    original = given.get("original_max_position_embeddings", max_positions)
    if kind == "longrope":
        given.setdefault("factor", max_positions / original)
    if kind == "proportional":
        given.setdefault("factor", 1.0)
    scales = [given.get(key) for key in ("mscale", "mscale_all_dim")]
    if "attention_factor" not in given and all(scales):
        of_head, of_all = (yarn_scale(given.get("factor", 1.0), scale) for scale in scales)
        given["attention_factor"] = of_head / of_all
    for missing in sorted(_NEEDED & _KEYS[kind] - set(given)):
        read.problems.append(f"rope type {kind!r} needs {missing}")
    return RopeConfig(
        kind=kind,
        theta=float(theta),
        factor=float(given.get("factor", 1.0)),
        # Dynamic scaling compares with the configured length (transformers ignores the other).
        original_max_positions=int(max_positions if kind == "dynamic" else original),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=float(given.get("attention_factor", 0.0)),
        truncate=bool(given.get("truncate", True)),
        short_factors=tuple(map(float, given.get("short_factor", ()))),
        long_factors=tuple(map(float, given.get("long_factor", ()))),
        fraction=fraction,
    )


def ropes_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """``rope_parameters`` of a family with a rotation for each kind of layer."""
    return {FULL: rope_to_hf(config.rope), SLIDING: rope_to_hf(config.local_rope)}


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """``rope_parameters`` of config.json."""
    values: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        values["partial_rotary_factor"] = rope.fraction
    if rope.kind != "default":
        values["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        values["low_freq_factor"] = rope.low_freq_factor
        values["high_freq_factor"] = rope.high_freq_factor
    if rope.kind == "yarn":
        values["beta_fast"] = rope.beta_fast
        values["beta_slow"] = rope.beta_slow
        values["truncate"] = rope.truncate
    if rope.kind == "longrope":
        values["short_factor"] = list(rope.short_factors)
        values["long_factor"] = list(rope.long_factors)
    if rope.attention_factor:
        values["attention_factor"] = rope.attention_factor
    return values
