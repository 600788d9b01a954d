"""A profile of training steps, and what is read from it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import WARM_STEPS, open_world

from benchmark.profile_reading import (
    EXCHANGE,
    Event,
    own_times,
    phase_of,
    time_by_operation,
)
from conlens_jax.config import ConfigError, from_config_dict
from conlens_jax.training.loop import train_lens

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


def test_own_time_leaves_out_what_is_inside():
    events = [Event("loop", 0, 10), Event("a", 1, 4), Event("a", 5, 6), Event("b", 12, 15)]
    events += [Event("inner", 2, 3)]
    found: dict[str, float] = {}
    for name, time in own_times(events):
        found[name] = found.get(name, 0) + time
    assert found == {"loop": 6, "a": 3, "inner": 1, "b": 3}


def test_phases_of_scopes():
    for scope, phase in (
        ("jit(train_step)/decode/while/body/dot_general", "decode"),
        ("jit(train_step)/jvp(encode)/add", "encode"),
        ("jit(train_step)/transpose(jvp(encode))/dot_general", "encode, backward"),
        ("jit(train_step)/jvp(text_anchor)/read/dot_general", "text_anchor"),
        ("jit(train_step)/optimizer/mul", "optimizer"),
        ("jit(train_step)/add", "other"),
    ):
        assert phase_of(scope) == phase
        assert phase_of(scope, "fusion.7") == phase
        for operation in ("all-reduce.162", "reduce-scatter.1", "all-gather-start.3"):
            assert phase_of(scope, operation) == EXCHANGE


def test_settings_of_a_profile():
    for steps in ((1,), (5, 2), (-1, 2), (1.0, 2.0)):
        with pytest.raises(ConfigError, match="profile.steps must be .first, last."):
            from_config_dict({"profile": {"steps": steps}})
    assert from_config_dict({"profile": {"steps": [2, 4]}}).profile.steps == (2, 4)


def test_steps_are_profiled_and_summed_up(world, tmp_path):
    """Two joint steps; the summary names the phases of the joint step, forward and backward."""
    steps = (WARM_STEPS + 2, WARM_STEPS + 3)
    changes = {"control__enabled": False, "profile__steps": steps, "train__validate_every": 100}
    run = train_lens(world.changed(tmp_path / "run", **changes))
    assert [path.name for path in (run / "profile").iterdir()] == ["joint"]
    # In another process: reading a profile where it was made has crashed JAX 0.11.
    done = subprocess.run(
        [sys.executable, "scripts/profile_summary.py", str(run / "profile" / "joint")],
        cwd=ROOT,
        env={"PYTHONPATH": ".", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    phases, operations = done.stdout.split("operations, the longest first")
    rows = re.findall(r"^  (\S.*?) {2,}([\d.]+) +[\d.]+%", phases, re.M)
    expected = {"decode", "prefix_pass", "re_forward", "encode", "encode, backward", "swap"}
    assert expected | {"optimizer"} <= {phase for phase, _ in rows}
    milliseconds = [float(value) for _, value in rows]
    assert milliseconds[0] > 0 and milliseconds == sorted(milliseconds, reverse=True)
    assert re.search(r"^  \S+ +[\d.]+ +[\d.]+%", operations, re.M)


def test_a_folder_without_a_profile(tmp_path):
    with pytest.raises(ConfigError, match=r"no \*.xplane.pb; train with --config.profile.steps"):
        time_by_operation(tmp_path)
