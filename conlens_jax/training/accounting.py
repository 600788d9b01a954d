"""Tables of the parts of a lens: trained, frozen or shared, their parameters and bytes."""

from __future__ import annotations

from collections.abc import Iterator

from conlens_jax.lens.spec import BELOW_THE_LAYERS, LensSpec
from conlens_jax.models.param_table import Params
from conlens_jax.parallel.footprint import count, device_bytes, in_units, total_bytes
from conlens_jax.training.state import TrainState

SIDES = ("decoder", "encoder")


def parameter_table(
    trainable: Params, frozen: Params, spec: LensSpec
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: part, trained or frozen, parameters, total bytes, bytes per device.

    A shared base is the original's own arrays: it has parameters, but takes no bytes of its own.
    Works on arrays and on shapes.
    """
    rows = [
        [f"{side} {name}", "trained", *_size(part)]
        for side in SIDES
        for name, part in sorted(trainable[side].items())
    ]
    rows += [[name, "frozen", *_size(part)] for name, part in _frozen_parts(frozen)]
    rows += [
        [
            f"{side} base",
            "shared with the original",
            _used(frozen["original"], side, spec),
            "0",
            "0",
        ]
        for side in SIDES
        if "base" not in trainable[side]
    ]
    rows.append(["total trained", "", *_size(trainable)])
    return ["part", "", "parameters", "bytes", "bytes per device"], rows


def stored_table(state: TrainState, frozen: Params) -> tuple[list[str], list[list[str]]]:
    """Header and rows: bytes per device of a stage's state, and of the gradients during a step."""
    parts = {
        "original model": frozen["original"],
        "frozen parts of the lens": {k: v for k, v in frozen.items() if k != "original"},
        "trained weights": state.params,
        "optimizer state": state.opt_state,
    }
    rows = [[name, in_units(device_bytes(part))] for name, part in parts.items()]
    rows.append(["total", in_units(sum(map(device_bytes, parts.values())))])
    rows.append(["gradients, during a step", in_units(device_bytes(state.params))])
    return ["part", "bytes"], rows


def _frozen_parts(frozen: Params) -> Iterator[tuple[str, Params]]:
    yield "original model", frozen["original"]
    for side in SIDES:
        for name, part in sorted(frozen[side].items()):
            yield f"{side} {name}", part


def _used(original: Params, side: str, spec: LensSpec) -> str:
    """The number of the original's parameters that a side uses; the encoder ends at the lens's
    layer."""
    if side == "decoder":
        return f"{count(original):,}"
    tables = sum(count(original[name]) for name in BELOW_THE_LAYERS if name in original)
    per_layer = count(original["layers"]) // spec.model.n_layers
    return f"{tables + (spec.layer + 1) * per_layer:,}"


def _size(tree: Params) -> tuple[str, str, str]:
    return f"{count(tree):,}", f"{total_bytes(tree):,}", f"{device_bytes(tree):,}"
