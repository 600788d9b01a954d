"""Communication between the devices of a compiled step, read from its HLO text.

A collective in a loop counts once per iteration (``known_trip_count``). Bytes are those sent by one
device with ring algorithms: with g devices in a group and n bytes of result,

    all-gather, all-to-all   n (g − 1) / g
    reduce-scatter           n (g − 1)
    all-reduce               2 n (g − 1) / g
    collective-permute       n
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
_MESH_PART = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of :data:`KINDS`.
      times: how often it runs per step.
      n_bytes: bytes that a device sends each time.
      group: the numbers of the devices in one group.
    """

    kind: str
    times: int
    n_bytes: float
    group: tuple[int, ...]

    @property
    def total_bytes(self) -> float:
        return self.times * self.n_bytes


def collectives_of(hlo: str) -> list[Collective]:
    """Every collective of a compiled program (``compiled.as_text()``) whose groups have more than
    one device."""
    computations, entry = _computations(hlo)
    found = []

    def visit(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            parts = _INSTRUCTION.match(line)
            if not parts:
                continue
            shape, opcode, rest = parts.groups()
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                group = _group(rest)
                if len(group) > 1:
                    n_bytes = _sent(kind, _result_bytes(shape, opcode), len(group))
                    found.append(Collective(kind, times, n_bytes, group))
            trips = _TRIPS.search(rest)
            inner = times * (int(trips[1]) if trips and opcode == "while" else 1)
            for called in _called(rest):
                visit(called, inner)

    visit(entry, 1)
    return found


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        head = _COMPUTATION.match(line)
        if head and not line.startswith(" "):
            name = head[2]
            lines[name] = []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            lines[name].append(line)
    return lines, entry


def _called(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for names in _BRANCHES.findall(rest):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _result_bytes(shape: str, opcode: str) -> float:
    """The shape of a ``-start`` has its operand as well as its result; the result is at least as
    large."""
    sizes = [
        math.prod(int(size) for size in dims.split(",") if size) * jnp.dtype(_dtype(kind)).itemsize
        for kind, dims in _SHAPE.findall(shape)
    ]
    return max(sizes) if opcode.endswith("-start") else sum(sizes)


def _dtype(name: str) -> str:
    long = {"f": "float", "s": "int", "u": "uint", "c": "complex"}
    if name == "pred":
        return "bool"
    return "bfloat16" if name == "bf16" else re.sub("^[fsuc]", lambda m: long[m[0]], name)


def _sent(kind: str, result: float, group: int) -> float:
    shares = {
        "all-gather": (group - 1) / group,
        "all-to-all": (group - 1) / group,
        "reduce-scatter": group - 1,
        "all-reduce": 2 * (group - 1) / group,
        "collective-permute": 1,
    }
    return result * shares[kind]


def _group(rest: str) -> tuple[int, ...]:
    if iota := _IOTA_GROUPS.search(rest):
        shape, dims, order = iota.groups()
        return tuple(_iota(dims, order).reshape(_numbers(shape))[0].tolist())
    if named := _MESH_GROUPS.search(rest):
        return _mesh_group(*named.groups())
    if listed := _LISTED_GROUPS.search(rest):
        return _numbers(listed[1])
    if pair := _PAIRS.search(rest):
        return int(pair[1]), int(pair[2])
    raise ValueError(f"collectives: cannot read the groups of devices in {rest[:200]!r}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Device numbers in the shape ``dims``, with its dimensions transposed to ``order``."""
    devices = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return devices.transpose(_numbers(order)) if order else devices


def _mesh_group(axes: str, dims: str | None, order: str | None, parts: str) -> tuple[int, ...]:
    """The first group of ``mesh['a'=2,'b'=4] {'b'}``; ``'b':(2)2`` is the part of size 2 of an axis
    after a part of size 2. The devices of the mesh may be in another order (``device_ids``)."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    within = {}
    for name, before, size in _MESH_PART.findall(parts):
        before, size = (int(before), int(size)) if size else (1, sizes[name])
        within[name] = (before, size)
    shape, along = [], []
    for name, whole in sizes.items():
        before, size = within.get(name, (whole, 1))
        shape += [before, size, whole // before // size]
        along.append(slice(None) if name in within else 0)
    devices = _iota(dims, order) if dims else np.arange(math.prod(sizes.values()))
    devices = devices.reshape(shape)
    index = tuple(part for size in along for part in (0, size, 0))
    return tuple(np.ravel(devices[index]).tolist())
