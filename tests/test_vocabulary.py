"""Logits in chunks of tokens: the same numbers, and never all of them at once."""

from __future__ import annotations

import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import BATCH, TEXT_LEN, relative_error, tiny_batch, tiny_lens, tiny_spec

from conlens_jax.config import LossConfig, WarmConfig
from conlens_jax.config.lens import ScheduleConfig
from conlens_jax.lens import vocabulary
from conlens_jax.lens.gumbel import drawn_noise
from conlens_jax.lens.objective import TERMS, Objective, joint_loss, prepare

VOCAB = 48


def joint_step(**lens):
    """(function, its inputs): loss terms and gradient of everything, noise from keys."""
    spec = tiny_spec(**lens)
    trainable, frozen = tiny_lens(spec)
    frozen |= {"warm_decoder": jax.tree.map(lambda leaf: 1.1 * leaf, trainable["decoder"])}
    loss = LossConfig(text=ScheduleConfig("constant", 1.0))
    objective = Objective(loss, WarmConfig(before=3, after=1), spec)
    keys_B = jax.random.split(jax.random.key(3), BATCH * objective.texts_per_row)
    weights, tau = {name: jnp.float32(1) for name in TERMS}, jnp.float32(0.7)

    def run(trainable, frozen, batch):
        noise = drawn_noise(keys_B, TEXT_LEN, 1.0)
        prepared = prepare(trainable, frozen, batch, noise, keys_B, objective=objective)
        inputs = (trainable, frozen, batch, prepared, weights, tau)
        return jax.value_and_grad(joint_loss, has_aux=True)(*inputs, objective=objective)

    return run, (trainable, frozen, tiny_batch(spec, frozen["original"]))


@functools.cache
def compiled_step(at_once: int = vocabulary.LOGITS_AT_ONCE, **lens):
    """(program, its inputs) of :func:`joint_step` with so many logits at once."""
    with mock.patch.object(vocabulary, "LOGITS_AT_ONCE", at_once):
        run, inputs = joint_step(**lens)
        return jax.jit(run).lower(*inputs).compile(), inputs


@pytest.mark.parametrize(
    "lens",
    [
        {},
        {"history_gradient": "sweeps", "history_sweeps": 1},
        {"estimator": "gumbel_rao", "estimator_samples": 2},
    ],
    ids=str,
)
def test_chunks_change_no_loss_and_no_gradient(lens):
    program, inputs = compiled_step(**lens)
    (total, terms), expected = program(*inputs)
    program, inputs = compiled_step(BATCH * VOCAB, **lens)
    (chunked_total, chunked_terms), gradient = program(*inputs)
    assert relative_error((chunked_total, chunked_terms), (total, terms)) < 1e-5
    moved = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if np.any(leaf)]
    assert relative_error(moved(gradient), moved(expected)) < 2e-5


def largest_vocabulary_array(program, inputs) -> int:
    """Elements of the largest fp32 array of a program that has the vocabulary as a dimension, the
    model's own tables apart."""
    text = program.as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    width = inputs[1]["original"]["embedding"].shape[1]
    found = [shape for shape in shapes if VOCAB in shape and width not in shape]
    return max(math.prod(shape) for shape in found)


def test_logits_of_all_tokens_are_never_there():
    whole = BATCH * TEXT_LEN * VOCAB
    assert largest_vocabulary_array(*compiled_step()) >= whole
    assert largest_vocabulary_array(*compiled_step(BATCH * VOCAB)) <= BATCH * VOCAB


def test_number_of_chunks():
    assert vocabulary.chunks_of(32, 8, 4096) == 1
    assert vocabulary.chunks_of(32, 32, 50_257) == 4
    assert vocabulary.chunks_of(4096, 6, 50_257) == 6  # a token of each text is the least


def test_drawn_noise_is_the_same_wherever_it_is_drawn():
    keys_B = jax.random.split(jax.random.key(0), 3)
    whole = drawn_noise(keys_B, 4).values(7)
    noise = drawn_noise(keys_B, 4, 0.5)
    for step in range(4):
        one = noise.at(jnp.int32(step)).values(7)
        np.testing.assert_array_equal(one[:, 0], 0.5 * whole[:, step])
    # An example's noise depends on its own key alone.
    np.testing.assert_array_equal(drawn_noise(keys_B[1:], 4).values(7), whole[1:])
