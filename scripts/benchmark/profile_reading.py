"""Time by operation and by phase, from a profile and the program that was profiled.

A profile has lines (threads of a CPU, streams of a GPU) of events; those with the statistic
``hlo_op`` are operations of the program. The event of a loop contains those of its body, so only an
event's own time is counted, without the events inside it.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from benchmark.collectives import KINDS
from conlens_jax.config import ConfigError
from conlens_jax.training.profile import HLO_FILE

_OP_NAME = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = .*metadata=\{.*?op_name="([^"]*)"', re.M)
PHASES = (
    *("capture", "decode", "prefix_pass", "reference", "re_forward", "sampled_tokens"),
    *("text_terms", "encode", "swap", "text_anchor", "read", "write", "optimizer"),
)
EXCHANGE = "between devices"


class Event(NamedTuple):
    """An executed operation: its name in the program, start and end in nanoseconds."""

    name: str
    start: float
    end: float


def time_by_operation(folder: Path) -> dict[str, float]:
    """Seconds of each operation of the newest profile below a folder, summed over all lines.

    Call it in another process than the profiled one: JAX 0.11 has crashed under Python 3.12 when it
    read a profile that it had just made.

    Raises:
      ConfigError: there is no profile, or none of its events is an operation.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(f"{folder}: no *.xplane.pb; train with --config.profile.steps=(a,b)")
    seconds: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines:
            for name, nanoseconds in own_times(_operations(line)):
                seconds[name] += nanoseconds / 1e9
    if not seconds:
        raise ConfigError(f"{files[-1]}: no event has the statistic hlo_op")
    return dict(seconds)


def _operations(line) -> Iterator[Event]:
    for event in line.events:
        name = dict(event.stats).get("hlo_op")
        if name is not None:
            yield Event(str(name), event.start_ns, event.start_ns + event.duration_ns)


def own_times(events: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """The time of each event without that of the events inside it."""
    around: list[list] = []  # [event, time of the events inside]
    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        while around and around[-1][0].end <= event.start:
            yield _closed(around)
        around.append([event, 0.0])
    while around:
        yield _closed(around)


def _closed(around: list[list]) -> tuple[str, float]:
    event, inside = around.pop()
    if around:
        around[-1][1] += event.end - event.start
    return event.name, event.end - event.start - inside


def scopes_of(folder: Path) -> dict[str, str]:
    """The scope (path of ``jax.named_scope``) of each operation, from the program stored with the
    profile."""
    return dict(_OP_NAME.findall((folder / HLO_FILE).read_text(encoding="utf-8")))


def phase_of(scope: str, operation: str = "") -> str:
    """The outermost phase of a scope; its gradient is a separate phase. Communication between
    devices is one phase: XLA merges the sums of many operations and names them after one."""
    if operation.startswith(KINDS):
        return EXCHANGE
    for part in scope.split("/"):
        inner = re.findall(r"[\w\-]+", part)
        if inner and inner[-1] in PHASES:
            return f"{inner[-1]}, backward" if "transpose" in inner else inner[-1]
    return "other"
