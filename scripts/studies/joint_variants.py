"""Joint stages that ``compare_joint.py`` compares: name → changes of a run's configuration."""

from __future__ import annotations

from typing import Any


def _rate(value: float) -> dict[str, float]:
    name = "joint.optimizer.learning_rate"
    return {f"{name}.start": value, f"{name}.end": value / 10}


def _sampled_at(temperature: float) -> dict[str, Any]:
    """Whatever the run's own schedule is."""
    return {"loss.sample_tau.kind": "constant", "loss.sample_tau.start": temperature}


# E is trained on D's own text; D continues with the warm start's objective.
_ON_POLICY = {
    "lens.estimator": "detached",
    "loss.entropy.start": 0.0,
    "loss.lm.start": 0.0,  # it would need passes of D and of the warm decoder over D's text
    "loss.kl.start": 0.0,
    "loss.mse.start": 1.0,
    **_rate(1e-3),
}
# These estimators sample at temperature 1 only.
_REINMAX = {"lens.estimator": "reinmax", "loss.tau.start": 1.0, **_sampled_at(1.0)}
_GUMBEL_RAO = {**_REINMAX, "lens.estimator": "gumbel_rao", "lens.estimator_samples": 4}
_RLOO = {
    "lens.estimator": "rloo",
    "lens.estimator_samples": 4,
    **_sampled_at(1.0),
    "joint.batch_size": 16,
    "loss.entropy.start": 0.0,
}
_FAST = {**_rate(5e-4), "loss.entropy.start": -1.0, "loss.kl.start": 1.5}
_EVEN = {"loss.entropy.start": 0.0}
_SHARED = {"joint.rows_per_document": 4}
_DETACHED = {"lens.history_gradient": "detached"}
# E reads only D's own text, the anchor trains D alone, and M reads a document once for four rows.
_LEAN = {
    **_EVEN,
    **_rate(1e-3),
    **_SHARED,
    **_DETACHED,
    "loss.lm.start": 0.0,
    "loss.text_read": False,
}
_AT_1 = {**_EVEN, **_rate(5e-4), **_sampled_at(1.0)}
# The quickstart's before it sampled at falling temperatures; priced already.
_PRICED = {
    "loss.mse.start": 1.0,
    "loss.kl.start": 0.1,
    **_sampled_at(1.0),
}
_COOLING = {
    **_PRICED,
    "loss.sample_tau.kind": "linear",
    "loss.sample_tau.end": 0.4,
}
_LESS_COOLING = {**_COOLING, "loss.sample_tau.end": 0.6}
LENGTH_PRICES = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
FLUENCY_WEIGHTS = (0.01, 0.03, 0.1, 0.3)  # L_LM against M, which reads the text alone
VARIANTS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "straight-through": {},
    "st, even": _EVEN,
    "st, even, fast": {**_EVEN, **_rate(5e-4)},
    "st, at 1": _AT_1,
    "st, priced 0.1": {**_AT_1, "loss.entropy.start": -0.1},
    "st, priced 0.2": {**_AT_1, "loss.entropy.start": -0.2},
    "st, priced 0.3, faster": {**_AT_1, **_rate(1e-3), "loss.entropy.start": -0.3},
    "st, as before": _PRICED,
    "st, cooler": {**_PRICED, **_sampled_at(0.7)},
    "st, cooling": _COOLING,
    "st, less price": {**_PRICED, "loss.entropy.start": -0.1},
    "st, more mse": {**_PRICED, "loss.mse.start": 4.0},
    "st, more mse, cooling": {**_COOLING, "loss.mse.start": 4.0},
    "st, more mse, cooling to 0.6": {**_LESS_COOLING, "loss.mse.start": 4.0},
    "st, mse 2, cooling to 0.6": {**_LESS_COOLING, "loss.mse.start": 2.0},
    "st, more of both, cooling to 0.6": {
        **_LESS_COOLING,
        "loss.mse.start": 4.0,
        "loss.kl.start": 0.4,
    },
    "st, more of both, cooling": {**_COOLING, "loss.mse.start": 4.0, "loss.kl.start": 0.4},
    "st, cooling to 0.8": {"loss.sample_tau.end": 0.8},
    "st, more kl": {"loss.kl.start": 1.0},
    "st, most kl": {"loss.kl.start": 2.0},
    "st, more kl, price 0.3": {"loss.kl.start": 1.0, "loss.entropy.start": -0.3},
    "st, most of both": {"loss.kl.start": 2.0, "loss.mse.start": 8.0},
    "st, more kl, cooling to 0.8": {"loss.kl.start": 1.0, "loss.sample_tau.end": 0.8},
    "st, more kl, more price": {"loss.kl.start": 1.0, "loss.entropy.start": -0.4},
    "st, reads targets": {**_PRICED, "loss.text_read": True},
    "st, wide": {**_EVEN, **_rate(1e-3), "joint.batch_size": 256},
    "st, even, strong": {**_EVEN, **_rate(5e-4), "loss.kl.start": 1.5, "loss.mse.start": 10.0},
    "st, even, tau 1": {**_EVEN, **_rate(5e-4), "loss.tau.start": 1.0},
    "st, even, no lm": {**_EVEN, **_rate(5e-4), "loss.lm.start": 0.0},
    "st, even, no anchor": {**_EVEN, **_rate(5e-4), "loss.text.start": 0.0},
    "st, shared": {**_EVEN, **_rate(5e-4), **_SHARED},
    "st, detached": {**_EVEN, **_rate(5e-4), **_DETACHED},
    "st, shared, detached": {**_EVEN, **_rate(5e-4), **_SHARED, **_DETACHED, "loss.lm.start": 0.0},
    "st, warm rate, shared": {**_EVEN, **_rate(1e-3), **_SHARED, "loss.lm.start": 0.0},
    "st, lean": _LEAN,
    "st, lean, exact": {**_LEAN, "lens.history_gradient": "exact"},
    "st, lean, light": {**_LEAN, "loss.mse.start": 1.0, "loss.kl.start": 0.1},
    "st, lean, sharper": {**_LEAN, "loss.entropy.start": -0.3},
    "st, lean, cooler": {
        **_LEAN,
        "loss.mse.start": 1.0,
        "loss.kl.start": 0.1,
        **_sampled_at(0.5),
    },
    "st, tau 1": {"loss.tau.start": 1.0},
    "st, no anchor": {"loss.text.start": 0.0},
    "st, KL to warm": {"loss.lm.start": 0.1, "loss.text.start": 0.0},
    "st, sharper": {
        **_rate(3e-4),
        "loss.entropy.start": -1.0,
        "loss.kl.start": 1.0,
        "loss.mse.start": 10.0,
        "loss.text.start": 2.0,
    },
    "st, fast": _FAST,
    "st, fast, cheap": {
        **_FAST,
        "joint.rows_per_document": 2,
        "lens.history_gradient": "detached",
        "loss.text_read": False,
    },
    "reinmax": _REINMAX,
    "reinmax, even": {**_EVEN, **_rate(5e-4), **_REINMAX},
    "gumbel-rao 4": _GUMBEL_RAO,
    "gumbel-rao 4, even": {**_EVEN, **_rate(5e-4), **_GUMBEL_RAO},
    "rloo 4": _RLOO,
    "rloo 4, no anchor": {**_RLOO, "loss.text.start": 0.0},
    "rloo 4, KL to warm": {**_RLOO, "loss.text.start": 0.0, "loss.lm.start": 0.1},
    "rloo 4, fast": {**_RLOO, **_rate(5e-4)},
    "grpo 4": {**_RLOO, "lens.estimator": "grpo"},
    "E on D's text": _ON_POLICY,
    "E on D's text, cooler": {**_ON_POLICY, **_sampled_at(0.5)},
    "E on D's text alone": {**_ON_POLICY, "loss.text_read": False},
    "E on D's text alone, shared": {
        **_ON_POLICY,
        **_SHARED,
        "loss.text_read": False,
        "loss.mse.start": 5.0,
        "loss.kl.start": 0.5,
    },
    "E on D's text alone, shared, cooler": {
        **_ON_POLICY,
        **_SHARED,
        "loss.text_read": False,
        "loss.mse.start": 5.0,
        "loss.kl.start": 0.5,
        **_sampled_at(0.5),
    },
    "E on D's text alone, kl": {
        **_ON_POLICY,
        "loss.text_read": False,
        "loss.kl.start": 0.1,
        "joint.rows_per_document": 2,
    },
    "rloo 2, cheap": {
        **_ON_POLICY,
        "lens.estimator": "rloo",
        "lens.estimator_samples": 2,
        **_sampled_at(1.0),
        "loss.text_read": False,
        "loss.mse.start": 2.0,
        "joint.batch_size": 32,
    },
    "E on D's text, kl": {**_ON_POLICY, "loss.kl.start": 0.5},
    **{f"st, length {price}": {"loss.length.start": price} for price in LENGTH_PRICES},
    **{
        f"st, fluent {weight}": {"loss.lm.start": weight, "loss.lm_reference": "text"}
        for weight in FLUENCY_WEIGHTS
    },
    "st, warm rate": {**_rate(1e-3), "loss.entropy.start": 0.0},
    "st, warm rate, cooler": {
        **_rate(1e-3),
        "loss.entropy.start": 0.0,
        "loss.kl.start": 0.0,
        **_sampled_at(0.5),
    },
}
