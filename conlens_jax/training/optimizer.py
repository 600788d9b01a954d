"""AdamW with a learning-rate multiplier for each part of the lens; skips non-finite steps.

The trainable tree has the top-level keys ``"decoder"`` and ``"encoder"``, each with some of
``"base"``, ``"lora"``, ``"projection"``, ``"soft_prompt"``, ``"output_head"`` and
``"input_patches"``; the multipliers of
:class:`~conlens_jax.config.OptimizerConfig` follow these names.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from conlens_jax.config import OptimizerConfig
from conlens_jax.lens.schedules import Schedule
from conlens_jax.models.param_table import Params

# apply_if_finite accepts a non-finite update after this many in a row. The training loop stops the
# run long before (OptimizerConfig.max_bad_steps).
_NEVER = 2**31 - 2

_SIDES = ("decoder", "encoder")


def make_optimizer(
    config: OptimizerConfig, params: Params, *, learning_rate: Schedule
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after a global-norm clip, as one optax transformation.

    With g the clipped gradient and m, v the bias-corrected Adam moments of a leaf w in part p:

        w ← w − learning_rate(step) · multiplier(p) · (m / (√v + 1e-8) + weight_decay · w)

    where the decay applies to matrices only (see :func:`decay_mask`). The learning rate's step
    counts the applied updates. Moments are fp32 for parameters of any dtype. A step with a
    non-finite gradient changes neither parameters nor moments and is counted
    (:class:`optax.ApplyIfFiniteState`).

    Args:
      config: all of it but the learning rate and the accumulation, which the caller handles.
      params: the trainable tree (arrays or ``ShapeDtypeStruct``).
      learning_rate: step → learning rate, see :func:`conlens_jax.lens.schedules.make_schedule`.

    Raises:
      ValueError: a part in params has no multiplier.
    """
    multipliers = learning_rate_multipliers(config, params)
    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(params)),
        _scale_leaves(multipliers),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _in_fp32(optax.apply_if_finite(adamw, max_consecutive_errors=_NEVER))


def apply_updates(params: Params, updates: Params) -> Params:
    """params + updates, added in fp32 and rounded once to the dtype of the parameter."""
    return jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)


def learning_rate_multipliers(config: OptimizerConfig, params: Params) -> Params:
    """The multiplier of every leaf, a tree of floats of the same structure as ``params``.

    Raises:
      ValueError: a top-level key other than decoder and encoder, or an unknown part.
    """
    parts = {
        "base": 1.0,
        "projection": config.projection_multiplier,
        "soft_prompt": config.soft_prompt_multiplier,
        "output_head": config.head_multiplier,
        "lora": config.lora_multiplier,
        "input_patches": config.patch_multiplier,
    }
    unknown: set[str] = set()

    def multiplier(path: tuple, leaf: Any) -> float:
        side, part = (*_names(path), "", "")[:2]
        if side not in _SIDES or part not in parts:
            unknown.add(f"{side}.{part}")
            return 1.0
        return parts[part] * (config.encoder_multiplier if side == "encoder" else 1.0)

    tree = jax.tree_util.tree_map_with_path(multiplier, params)
    if unknown:
        raise ValueError(
            f"no learning-rate multiplier for {', '.join(sorted(unknown))}: trainable parts are "
            f"{' or '.join(_SIDES)}, then one of {', '.join(parts)}"
        )
    return tree


def decay_mask(params: Params) -> Params:
    """True for the leaves that weight decay applies to: matrices, never biases or norms.

    Layers are stacked, so a norm's scale is [layers, width] and a bias can be too; both are
    recognised by their name, or by a parent whose name ends in ``norm``. Attention sinks, [layers,
    heads], are logits.
    """

    def decays(path: tuple, leaf: Any) -> bool:
        names = _names(path)
        is_norm = any(name.endswith("norm") for name in names)
        is_vector = "bias" in names[-1].split("_") or names[-1] == "sinks"
        return leaf.ndim >= 2 and not is_norm and not is_vector

    return jax.tree_util.tree_map_with_path(decays, params)


def poison_if_not_finite(loss: jax.Array, grads: Params) -> Params:
    """Makes every gradient NaN if the loss is not finite, so that the optimizer skips the step.

    A loss can overflow while its gradients stay finite (a clipped or saturated term).
    """
    return jax.tree.map(lambda g: jnp.where(jnp.isfinite(loss), g, jnp.nan).astype(g.dtype), grads)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _in_fp32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Computes in fp32, moments and updates too, for gradients and parameters of any dtype."""

    def init(params: Params) -> optax.OptState:
        return inner.init(_fp32(params))

    def update(
        grads: Params, state: optax.OptState, params: Params
    ) -> tuple[Params, optax.OptState]:
        # optax mixes its int32 counters with floats, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(_fp32(grads), state, _fp32(params))

    return optax.GradientTransformation(init, update)


def _fp32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _scale_leaves(multipliers: Params) -> optax.GradientTransformation:
    def scale(updates: Params, params: Params) -> Params:
        return jax.tree.map(lambda u, m: u * m, updates, multipliers)

    return optax.stateless(scale)
