"""Schedules against their closed forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from conlens_jax.config import ScheduleConfig
from conlens_jax.lens.schedules import make_schedule


def values(config: ScheduleConfig, steps, *, stage_steps: int = 100, steps_per_epoch: float = 7.5):
    schedule = make_schedule(config, stage_steps=stage_steps, steps_per_epoch=steps_per_epoch)
    return [float(schedule(step)) for step in steps]


CLOSED_FORMS = {
    "linear": lambda x, start, end: start + x * (end - start),
    "cosine": lambda x, start, end: end + (start - end) * (1 + math.cos(math.pi * x)) / 2,
    "exponential": lambda x, start, end: start * (end / start) ** x,
}


@pytest.mark.parametrize("kind", CLOSED_FORMS)
@pytest.mark.parametrize(("start", "end"), [(2.0, 0.5), (0.5, 2.0)])
def test_closed_form_between_warmup_and_end(kind, start, end):
    config = ScheduleConfig(kind, start, end, length=40, warmup=10)
    steps = [10, 11, 25, 49, 50, 80]
    expected = [CLOSED_FORMS[kind](min((s - 10) / 40, 1), start, end) for s in steps]
    assert values(config, steps) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_weight_can_rise_from_zero_and_fall_to_it(kind):
    assert values(ScheduleConfig(kind, 0.0, 1.0, length=10), [0, 5, 10, 11]) == pytest.approx(
        [0, 0.5, 1, 1], abs=1e-6
    )
    assert values(ScheduleConfig(kind, 1.0, 0.0, length=10), [0, 5, 10, 11]) == pytest.approx(
        [1, 0.5, 0, 0], abs=1e-6
    )


def test_constant_ignores_end_and_time():
    assert values(ScheduleConfig("constant", 3.0, 9.0, length=2), [0, 1, 2, 99]) == [3.0] * 4


def test_warmup_starts_above_zero_and_reaches_start_in_its_last_step():
    config = ScheduleConfig("constant", 4.0, warmup=4)
    assert values(config, [0, 1, 2, 3, 4, 5]) == pytest.approx([1, 2, 3, 4, 4, 4])


def test_length_zero_is_the_rest_of_the_stage_after_warmup():
    config = ScheduleConfig("linear", 1.0, 0.0, warmup=20)
    assert values(config, [20, 60, 99, 100, 200], stage_steps=100) == pytest.approx(
        [1, 0.5, 1 / 80, 0, 0], abs=1e-6
    )


def test_epochs_convert_both_lengths():
    epochs = ScheduleConfig("cosine", 1.0, 0.1, length=4, warmup=2, unit="epochs")
    steps = ScheduleConfig("cosine", 1.0, 0.1, length=30, warmup=15)
    where = [0, 7, 14, 15, 30, 44, 45, 90]
    assert values(epochs, where, steps_per_epoch=7.5) == values(steps, where)


def test_a_stage_that_is_all_warmup_is_defined():
    assert values(ScheduleConfig("cosine", 1.0, 0.0, warmup=5), [0, 4], stage_steps=5) == (
        pytest.approx([0.2, 1.0])
    )


@pytest.mark.parametrize("kind", ["constant", *CLOSED_FORMS])
def test_traced_step_gives_fp32_scalars_equal_to_the_eager_ones(kind):
    schedule = make_schedule(
        ScheduleConfig(kind, 1.0, 0.1, warmup=3), stage_steps=20, steps_per_epoch=1
    )
    steps = jnp.arange(25, dtype=jnp.int32)
    traced = jax.jit(jax.vmap(schedule))(steps)
    assert traced.dtype == jnp.float32 and schedule(3).shape == ()
    assert traced.tolist() == pytest.approx([float(schedule(int(s))) for s in steps], rel=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ScheduleConfig("quadratic", 1.0), "quadratic"),
        (ScheduleConfig("linear", 1.0, unit="hours"), "hours"),
        (ScheduleConfig("exponential", 1.0, 0.0), "above 0"),
    ],
)
def test_bad_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(config, stage_steps=10, steps_per_epoch=1)
