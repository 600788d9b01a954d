"""Windows around an activation that are not at the place where the warm start reads them."""

from __future__ import annotations

import numpy as np
import pytest

from conlens_jax.config import WarmConfig
from conlens_jax.data.rows import Rows
from conlens_jax.data.stream import CapturedRows
from conlens_jax.training.auditor import ShiftedWindows

N_ROWS, WINDOW = 600, WarmConfig(before=2, after=3)


@pytest.fixture(scope="module")
def rows():
    activations = np.arange(N_ROWS, dtype=np.float32)[:, None]
    positions = np.where(np.arange(N_ROWS) % 2, 3, 9).astype(np.int32)
    lengths = np.full(N_ROWS, 15, np.int32)
    tokens = np.zeros((N_ROWS, 20), np.int32)
    return Rows(activations, tokens, positions, lengths, np.arange(N_ROWS))


def test_shifted_windows_stay_inside_the_document(rows):
    shifted = ShiftedWindows(CapturedRows(rows), WINDOW, shift=4, seed=0)
    assert len(shifted) == N_ROWS
    found = shifted.rows(np.arange(N_ROWS)).positions_N
    # A window needs one token before its position and three behind it, of 15.
    for parity, start, expected in ((1, 3, range(1, 8)), (0, 9, range(5, 12))):
        values, counts = np.unique(found[np.arange(N_ROWS) % 2 == parity], return_counts=True)
        assert values.tolist() == list(expected), start
        assert counts.min() > 0.5 * counts.mean()


def test_the_activation_stays_and_a_row_is_shifted_alike_in_any_batch(rows):
    shifted = ShiftedWindows(CapturedRows(rows), WINDOW, shift=2, seed=1)
    everything, some = shifted.rows(np.arange(N_ROWS)), np.array([7, 400, 7])
    np.testing.assert_array_equal(shifted.rows(some).positions_N, everything.positions_N[some])
    np.testing.assert_array_equal(everything.activations_ND, rows.activations_ND)
    (places,) = shifted.places()
    np.testing.assert_array_equal(places.positions_N, everything.positions_N)
    other = ShiftedWindows(CapturedRows(rows), WINDOW, shift=2, seed=2).rows(np.arange(N_ROWS))
    assert np.any(other.positions_N != everything.positions_N)
