"""The optimizer: multipliers, clip, decay, and what happens on a bad step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conlens_jax.config import OptimizerConfig
from conlens_jax.training.optimizer import (
    apply_updates,
    decay_mask,
    make_optimizer,
    poison_if_not_finite,
)

LR = 0.01
CONFIG = OptimizerConfig(
    clip_norm=1e9,
    projection_multiplier=3.0,
    soft_prompt_multiplier=5.0,
    head_multiplier=0.5,
    encoder_multiplier=2.0,
)


def lens_tree(dtype=jnp.float32):
    def side():
        return {
            "base": {
                "embedding": jnp.full((6, 4), 0.5, dtype),
                "layers": {
                    "q": jnp.full((3, 4, 4), 0.5, dtype),
                    "q_bias": jnp.full((3, 4), 0.5, dtype),
                    "attention_norm": jnp.full((3, 4), 0.5, dtype),
                    "mlp_norm": {"scale": jnp.full((3, 4), 0.5, dtype)},
                },
            },
            "projection": {
                "kernel": jnp.full((4, 4), 0.5, dtype),
                "bias": jnp.full((4,), 0.5, dtype),
            },
            "soft_prompt": {"vectors": jnp.full((2, 4), 0.5, dtype)},
            "output_head": jnp.full((4, 6), 0.5, dtype),
        }

    return {"decoder": side(), "encoder": side()}


def gradients(params, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.choice([-1, 1], p.shape) * rng.uniform(0.1, 1, p.shape), p.dtype),
        params,
    )


def optimizer(params, learning_rate=lambda step: LR, **changes):
    return make_optimizer(
        dataclasses.replace(CONFIG, **changes), params, learning_rate=learning_rate
    )


def one_update(params, grads, **changes):
    transformation = optimizer(params, **changes)
    return jax.jit(transformation.update)(grads, transformation.init(params), params)[0]


def test_first_step_is_the_sign_times_learning_rate_times_multiplier():
    params = lens_tree()
    grads = gradients(params)
    updates = one_update(params, grads)
    part = {"base": 1.0, "projection": 3.0, "soft_prompt": 5.0, "output_head": 0.5}
    for side, of_side in (("decoder", 1.0), ("encoder", 2.0)):
        for name, multiplier in part.items():
            # Adam's first step is g / (|g| + eps), whatever the size of the gradient.
            for update, grad in zip(
                jax.tree.leaves(updates[side][name]),
                jax.tree.leaves(grads[side][name]),
                strict=True,
            ):
                expected = -LR * multiplier * of_side * np.sign(grad)
                np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=f"{side}.{name}")


def test_clip_acts_on_the_global_norm_and_only_above_it():
    params = lens_tree()
    huge = jax.tree.map(lambda g: 1e3 * g, gradients(params, 1))
    small = jax.tree.map(lambda g: 0.03 * g, gradients(params, 2))

    def run(clip_norm, rescale):
        transformation = optimizer(params, clip_norm=clip_norm)
        update = jax.jit(transformation.update)
        _, state = update(rescale(huge), transformation.init(params), params)
        return update(rescale(small), state, params)[0]

    def by_hand(grads):
        norm = float(np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads))))
        return jax.tree.map(lambda g: g * min(1.0, 1.0 / norm), grads)

    clipped, expected = run(1.0, lambda g: g), run(1e9, by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), clipped, expected)
    unclipped = run(1e9, lambda g: g)["decoder"]["output_head"]
    assert not np.allclose(clipped["decoder"]["output_head"], unclipped, rtol=0.1)


def test_decay_is_for_matrices_not_for_biases_and_norms():
    params = lens_tree()
    mask = decay_mask(params)["decoder"]
    layers = mask["base"]["layers"]
    assert mask["base"]["embedding"] and layers["q"] and mask["projection"]["kernel"]
    assert not any([layers["q_bias"], layers["attention_norm"], layers["mlp_norm"]["scale"]])
    assert not mask["projection"]["bias"]


def test_decay_is_decoupled_and_scaled_with_the_learning_rate():
    params = lens_tree()
    zero = jax.tree.map(jnp.zeros_like, params)
    updates = one_update(params, zero, weight_decay=0.1)["encoder"]
    # No gradient: only the decay moves a weight, by learning rate · multipliers · decay · weight.
    np.testing.assert_allclose(updates["projection"]["kernel"], -LR * 3 * 2 * 0.1 * 0.5, rtol=1e-5)
    np.testing.assert_array_equal(updates["projection"]["bias"], 0)
    np.testing.assert_array_equal(updates["base"]["layers"]["attention_norm"], 0)


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_a_bad_step_changes_nothing_but_the_counters(bad):
    params = lens_tree()
    transformation = optimizer(params, learning_rate=lambda step: LR * (step + 1))

    @jax.jit
    def step(params, state, grads, loss):
        grads = poison_if_not_finite(loss, grads)
        updates, state = transformation.update(grads, state, params)
        return apply_updates(params, updates), state

    good = gradients(params)
    params, state = step(params, transformation.init(params), good, jnp.float32(1))
    assert (int(state.notfinite_count), int(state.total_notfinite)) == (0, 0)
    before = (params, state.inner_state)
    if bad == "gradient":
        spoiled = jax.tree.map(lambda g: g, good)
        spoiled["encoder"]["projection"]["bias"] = (
            good["encoder"]["projection"]["bias"].at[0].set(jnp.inf)
        )
        bad_input = (spoiled, jnp.float32(1))
    else:
        bad_input = (good, jnp.float32(jnp.nan))
    for count in (1, 2):
        params, state = step(params, state, *bad_input)
        assert (int(state.notfinite_count), int(state.total_notfinite)) == (count, count)
    jax.tree.map(np.testing.assert_array_equal, before, (params, state.inner_state))
    after, state = step(params, state, good, jnp.float32(1))
    assert (int(state.notfinite_count), int(state.total_notfinite)) == (0, 2)
    # The same gradient twice: Adam's second step is the sign again, at the schedule's second rate.
    moved = params["decoder"]["output_head"] - after["decoder"]["output_head"]
    np.testing.assert_allclose(
        moved, 2 * LR * 0.5 * np.sign(good["decoder"]["output_head"]), rtol=1e-3
    )


def test_moments_are_fp32_for_bf16_parameters():
    params = lens_tree(jnp.bfloat16)
    transformation = optimizer(params)
    state = transformation.init(params)
    for grad_dtype in (jnp.bfloat16, jnp.float32):
        grads = jax.tree.map(lambda g, d=grad_dtype: g.astype(d), gradients(params))
        updates, state = jax.jit(transformation.update)(grads, state, params)
        params = apply_updates(params, updates)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        assert len(moments) == 2 * len(jax.tree.leaves(params))
        assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}


def test_unknown_parts_are_named_together():
    params = {"decoder": {"adapter": jnp.zeros(2)}, "reader": {"base": jnp.zeros(2)}}
    with pytest.raises(ValueError, match=r"decoder\.adapter, reader\.base"):
        optimizer(params)


def test_abstract_parameters_are_enough_and_state_keeps_its_structure():
    params = lens_tree()
    abstract = jax.eval_shape(lambda: params)
    transformation = optimizer(abstract)
    state = jax.eval_shape(transformation.init, abstract)
    _, after = jax.eval_shape(transformation.update, abstract, state, abstract)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert jax.tree.leaves(state) == jax.tree.leaves(after)
