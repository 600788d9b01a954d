"""Values that depend on the step: learning rates, loss weights, the Gumbel temperature.

Example:

    config = ScheduleConfig("cosine", start=1e-3, end=1e-4, warmup=10)
    schedule = make_schedule(config, stage_steps=300, steps_per_epoch=50)
    schedule(0)    # 1e-4: the first of ten warm-up steps
    schedule(9)    # 1e-3: the last one
    schedule(300)  # 1e-4, and from then on
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from conlens_jax.config import ScheduleConfig

Schedule = Callable[[jax.Array | int], jax.Array]


def make_schedule(config: ScheduleConfig, *, stage_steps: int, steps_per_epoch: float) -> Schedule:
    """The function from the step of the stage (the first is 0) to the value, a scalar fp32.

    With w warm-up steps and then n steps from start to end, at step s:

    * s < w: ``start (s + 1) / w``: above 0 at step 0, so that the first optimizer step is not
      wasted, and ``start`` at step w − 1.
    * s ≥ w, with x = min((s − w) / n, 1): ``constant`` start, ``linear`` start + x (end − start),
      ``cosine`` end + (start − end) (1 + cos πx) / 2 (Loshchilov & Hutter 2017, SGDR),
      ``exponential`` start (end / start)^x. The value stays at ``end`` from x = 1 on.

    The returned function can be called inside ``jit`` with a traced step.

    Args:
      config: length and warmup are in ``config.unit``, rounded to whole steps; a length of 0 is
        the rest of the stage after warm-up.
      stage_steps: optimizer steps of the stage.
      steps_per_epoch: optimizer steps per pass over the training rows; need not be an integer.

    Raises:
      ValueError: an unknown kind or unit, or an exponential schedule that touches 0.
    """
    steps_per_unit = _steps_per_unit(config.unit, steps_per_epoch)
    warmup = round(config.warmup * steps_per_unit)
    length = round(config.length * steps_per_unit) if config.length else stage_steps - warmup
    # A warm-up as long as the stage leaves no steps; one keeps the formulas defined.
    after_warmup = _after_warmup(config, max(length, 1))

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)  # exact up to 2^24 steps
        value = after_warmup(jnp.maximum(step - warmup, 0.0))
        if warmup:
            rising = config.start * (step + 1) / warmup
            value = jnp.where(step < warmup, rising, value)
        return jnp.asarray(value, jnp.float32)

    return schedule


def _steps_per_unit(unit: str, steps_per_epoch: float) -> float:
    match unit:
        case "steps":
            return 1.0
        case "epochs":
            return steps_per_epoch
    raise ValueError(f"a schedule's unit must be 'steps' or 'epochs', not {unit!r}")


def _after_warmup(config: ScheduleConfig, length: int) -> Schedule:
    """From ``start`` at step 0 to ``end`` at step ``length``."""
    start, end = config.start, config.end
    match config.kind:
        case "constant":
            return optax.constant_schedule(start)
        case "linear":
            return optax.linear_schedule(start, end, length)
        case "cosine":
            # optax gives the end as a fraction of the start, so it cannot rise from 0.
            falling = optax.cosine_decay_schedule(1.0, length)
            return lambda step: end + (start - end) * falling(step)
        case "exponential":
            if not (start > 0 and end > 0):
                raise ValueError("an exponential schedule needs start and end above 0")
            return optax.exponential_decay(start, length, end / start, end_value=end)
    raise ValueError(
        f"a schedule's kind must be constant, linear, cosine or exponential, not {config.kind!r}"
    )
