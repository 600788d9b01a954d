"""Statistics of every layer, against the cache's own layer and by what a last layer must be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from pipeline import open_world

from conlens_jax.measurement.runner import activation_statistics
from layer_sweep import LayerStatistics, layer_statistics


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with open_world(tmp_path_factory) as world:
        yield world


def test_statistics_of_the_caches_layer_are_the_caches(world):
    session = world.session
    rows = session.caches[1].rows(np.arange(32))
    # The rows' own activations, of one layer, must not be what is measured.
    blind = dataclasses.replace(rows, activations_ND=np.zeros_like(rows.activations_ND))
    found = layer_statistics(session.model.params, blind, session.spec, session.mesh, 16)
    assert [statistics.layer for statistics in found] == [0, 1, 2]
    own = found[session.spec.layer]
    assert own.resultant == pytest.approx(
        activation_statistics(rows.activations_ND).resultant, rel=1e-4
    )
    norms = np.linalg.norm(rows.activations_ND.astype(np.float64), axis=1)
    assert own.median_norm == pytest.approx(np.median(norms), rel=1e-4)
    measured = session.measurer().effects(
        session.model.params, rows, {"zero": np.zeros_like(rows.activations_ND)}
    )
    assert own.kl_zero == pytest.approx(measured["zero"].kl_at.mean(), rel=1e-3)
    assert len({round(statistics.resultant, 6) for statistics in found}) == 3
    assert all(statistics.kl_mean > 0 for statistics in found)


def test_layers_with_one_direction_are_flagged():
    of = lambda resultant: LayerStatistics(0, resultant, 1.0, 0.0, 1.0, 1.0)
    assert of(0.99).has_low_variance and not of(0.5).has_low_variance
