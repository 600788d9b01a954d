"""Rows from one document in a batch: M reads the context once, and nothing else is different."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lens import relative_error, tiny_batch, tiny_lens, tiny_noise, tiny_spec

from conlens_jax.config import LossConfig, WarmConfig
from conlens_jax.config.lens import ScheduleConfig
from conlens_jax.data.batches import document_groups, grouped_batch, read_groups
from conlens_jax.data.device_batches import make_batch
from conlens_jax.data.rows import Places, Rows
from conlens_jax.lens.objective import TERMS, Objective, joint_loss, prepare, swap_vector

SHARED = 2
FIRST = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def rows_of(documents: list[int]) -> Rows:
    n = len(documents)
    return Rows(
        activations_ND=np.arange(2 * n, dtype=np.float32).reshape(n, 2),
        tokens_NS=np.repeat(np.asarray(documents, np.int32)[:, None], 3, axis=1),
        positions_N=np.arange(n, dtype=np.int32),
        lengths_N=np.full(n, 3, np.int32),
        documents_N=np.asarray(documents, np.int64),
    )


class Cache:
    def __init__(self, documents):
        self._rows = rows_of(documents)

    def places(self):
        yield Places.of(self._rows)

    def __len__(self):
        return len(self._rows)

    def rows(self, indices):
        return self._rows.take(indices)


def shared_and_apart(spec, original):
    """The same rows, with contexts shared by two neighbours and with one context a row."""
    shared = tiny_batch(spec, original, batch=8)
    half = lambda array: array[::SHARED]
    # P of both rows must lie in the document that they now share.
    ends = half(shared.lengths_G)
    positions = jnp.minimum(shared.positions_B, jnp.repeat(ends, SHARED) - 4)
    shared = dataclasses.replace(
        shared, tokens_GS=half(shared.tokens_GS), lengths_G=ends, positions_B=positions
    )
    each = lambda array: jnp.repeat(array, SHARED, axis=0)
    apart = dataclasses.replace(
        shared, tokens_GS=each(shared.tokens_GS), lengths_G=each(shared.lengths_G)
    )
    return shared, apart


@pytest.mark.parametrize("estimator", ["straight_through", "rloo"])
def test_a_shared_context_changes_no_loss_and_no_gradient(estimator):
    spec = tiny_spec(dual_path=False, estimator=estimator, estimator_samples=2)
    trainable, frozen = tiny_lens(spec)
    loss = LossConfig(text=ScheduleConfig("constant", 1.0), kl_horizon=2, lm=LossConfig().kl)
    objective = Objective(loss, WarmConfig(before=3, after=1), spec)
    frozen |= {"warm_decoder": jax.tree.map(lambda x: 1.1 * x, trainable["decoder"])}
    noise = tiny_noise(8 * objective.texts_per_row)
    weights, tau = {name: jnp.float32(1) for name in TERMS}, jnp.float32(1)

    @jax.jit
    def run(trainable, frozen, batch):
        prepared = prepare(trainable, frozen, batch, noise, objective=objective)
        inputs = (trainable, frozen, batch, prepared, weights, tau)
        (_, terms), gradient = jax.value_and_grad(joint_loss, has_aux=True)(
            *inputs, objective=objective
        )
        return terms, gradient

    shared, apart = shared_and_apart(spec, frozen["original"])
    assert (shared.rows_per_document, apart.rows_per_document) == (2, 1)
    ours, expected = run(trainable, frozen, shared), run(trainable, frozen, apart)
    assert relative_error(ours[0], expected[0]) < 1e-5
    used = lambda gradient: [leaf for leaf in jax.tree.leaves(gradient) if np.any(leaf)]
    assert relative_error(used(ours[1]), used(expected[1])) < 1e-5


def test_the_other_activation_is_of_another_document():
    spec = tiny_spec(dual_path=True)
    actual = jnp.arange(8.0)[:, None] * jnp.ones((8, 2))
    found = swap_vector(jnp.zeros((8, 2)), actual, spec, SHARED)
    documents = np.asarray(found)[:, 0].astype(int) // SHARED
    assert not np.any(documents == np.arange(8) // SHARED)


def test_groups_are_whole_and_of_one_document():
    groups = document_groups(np.asarray([4, 4, 4, 4, 4, 9, 7, 7, 7]), 2)
    assert groups.tolist() == [[0, 1], [2, 3], [6, 7]]
    assert document_groups(np.asarray([1, 2, 3]), 2).shape == (0, 2)
    assert document_groups(np.asarray([5, 5]), 1).tolist() == [[0], [1]]


def test_batches_are_whole_groups():
    cache = Cache([0, 0, 1, 1, 2, 2, 3, 3, 3])
    groups = read_groups(cache, 2)
    seen = [grouped_batch(groups, 4, seed=0, step=step).tolist() for step in (0, 1)]
    assert sorted(seen[0] + seen[1]) == list(range(8))
    for indices in seen:
        batch = make_batch(cache.rows(indices), FIRST, 4, rows_per_document=2)
        assert batch.tokens_GS[:, 0].tolist() == [i // 2 for i in indices[::2]]
        assert batch.positions_B.tolist() == indices
    with pytest.raises(ValueError, match=r"joint.rows_per_document=4.*positions_per_sequence"):
        read_groups(cache, 4)
    with pytest.raises(ValueError, match="from one document"):
        make_batch(cache.rows(np.asarray([0, 2])), FIRST, 2, rows_per_document=2)
