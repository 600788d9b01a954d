"""Positions, seeds and vectors of every odd kind: what they mean, or a refusal that names them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipeline import quick_compilation
from tiny_models import random_tokens
from tiny_user import LAYER, TEXT, TEXTS, tiny_user_lens

from conlens_jax.config.seeds import numpy_seed, random_key
from conlens_jax.corpora.stories import story
from conlens_jax.data.batches import batch_indices

LENGTH, WIDTH = 10, 32


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    with quick_compilation(tmp_path_factory):
        yield tiny_user_lens(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(3, LENGTH)


@pytest.fixture(scope="module")
def mask():
    """Right padding, left padding, none."""
    mask = np.ones((3, LENGTH), bool)
    mask[0, 7:] = mask[1, :4] = False
    return mask


@pytest.fixture(scope="module")
def states(lens, tokens, mask):
    return np.asarray(lens.model.capture(tokens, LAYER, mask=mask))


# --- positions of a batch -----------------------------------------------------------------------


def test_negative_positions_count_real_tokens(lens, tokens, mask, states):
    rows = np.arange(3)
    for position, places in ((-1, [6, 9, 9]), (-3, [4, 7, 7]), ([-7, -6, -10], [0, 4, 0])):
        found = lens.model.capture(tokens, LAYER, position, mask)
        np.testing.assert_array_equal(found, states[rows, places])
        other = np.asarray(found) + 0.5
        swapped = lens.model.swap(tokens, LAYER, position, other, mask)
        np.testing.assert_array_equal(swapped, lens.model.swap(tokens, LAYER, places, other, mask))


def test_a_boolean_mask_selects_one_token_of_each_row(lens, tokens, mask, states):
    marks = np.zeros((3, LENGTH), bool)
    marks[[0, 1, 2], [6, 4, 0]] = True
    for same in (marks, jnp.asarray(marks), marks.tolist()):
        found = lens.model.capture(tokens, LAYER, same, mask)
        np.testing.assert_array_equal(found, states[[0, 1, 2], [6, 4, 0]])
    found = lens.model.capture(tokens, LAYER, np.arange(LENGTH) == 5, mask)
    np.testing.assert_array_equal(found, states[:, 5])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([7, 4, 0], "position 7 of row 0 is padding"),
        ([0, 3, 0], "position 3 of row 1 is padding"),
        (8, "position 8 of row 0 is padding"),
        ([-8, -7, -1], "row 0 has 7 real tokens, and no token -8; row 1 has 6 real tokens"),
        (LENGTH, "must be below the sequence length 10"),
        (2**70, "must be below the sequence length 10"),
        (3.0, "whole numbers.*not 3.0"),
        ([3.5, 3, 3], "whole numbers"),
        (True, "whole numbers"),
        ([True, 3, 3], "whole numbers"),
        ({3}, "must have an order"),
        ([[1], [2, 3], [4]], "whole numbers"),
        ("3", "whole numbers"),
        ([], "one index or one for each of the 3 rows"),
        ([1, 2], "one index or one for each of the 3 rows"),
        ([True, False, True], r"mask of shape \(3,\); it must be \(3, 10\)"),
        (np.arange(LENGTH) < 2, "marks 2 tokens of row 0.*marks 2 tokens of row 2"),
        (np.arange(LENGTH) == 8, "position 8 of row 0 is padding"),
    ],
    ids=str,
)
def test_positions_that_cannot_be_are_refused(lens, tokens, mask, positions, message):
    with pytest.raises(ValueError, match=f"positions.*{message}"):
        lens.model.capture(tokens, LAYER, positions, mask)
    with pytest.raises(ValueError, match=f"positions.*{message}"):
        lens.model.swap(tokens, LAYER, positions, np.zeros((3, WIDTH)), mask)


def test_positions_and_activations_inside_a_jit(lens, tokens, mask, states):
    """Tokens are values there; an activation may be traced, and differentiated through."""
    vectors = jnp.asarray(states[[0, 1, 2], [6, 9, 9]])
    call = lambda vectors: lens.model.swap(tokens, LAYER, -1, vectors, mask)
    # Compiled as one program, sums are rounded otherwise.
    np.testing.assert_allclose(jax.jit(call)(vectors), call(vectors), rtol=0, atol=1e-5)
    gradient = jax.grad(lambda vectors: call(vectors)[0, 6, 5])(vectors)
    assert np.abs(gradient[0]).max() > 0 and not np.any(gradient[1])
    captured = jax.jit(lambda: lens.model.capture(tokens, LAYER, -1, mask))()
    np.testing.assert_allclose(captured, vectors, rtol=0, atol=1e-5)


def test_a_swap_needs_a_position(lens, tokens):
    with pytest.raises(ValueError, match="positions must be given.*not None"):
        lens.model.swap(tokens, LAYER, None, np.zeros((3, WIDTH)))


# --- positions in a text ------------------------------------------------------------------------


def test_positions_in_a_text(lens):
    n = len(lens.tokens(TEXT))
    marks = np.zeros(n, bool)
    marks[[2, 5]] = True
    every = lens.capture(TEXT, "all")
    for positions in (
        *([2, 5], (2, 5), range(2, 6, 3), slice(2, 6, 3), marks, marks.tolist(), [2 - n, 5 - n]),
        *(np.array([2, 5], np.uint8), jnp.array([2, 5]), [np.int64(2), 5]),
    ):
        np.testing.assert_array_equal(lens.capture(TEXT, positions), every[[2, 5]])
    for position in (3, np.int32(3), np.array(3), jnp.int32(3), 3 - n):
        found = lens.capture(TEXT, position)
        np.testing.assert_array_equal(found, every[3])
        assert lens.swap(TEXT, position, found).position == 3
    assert lens.capture(TEXT, [3]).shape == (1, WIDTH)


def test_a_position_asked_for_twice_is_explained_once_and_given_twice(lens):
    n = len(lens.tokens(TEXT))
    found = lens.explain(TEXT, [3, 5, 3 - n, 3], progress=False)
    assert [row.position for row in found] == [3, 5, 3, 3]
    assert {len(row.readings) for row in found} == {1}
    assert found[0] == found[2] == found[3]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (None, "must be given"),
        (3.0, "whole numbers"),
        ([3.5], "whole numbers"),
        (True, "whole numbers"),
        ([1, True], "whole numbers"),
        ({1, 2}, "must have an order"),
        ({1: 2}, "must have an order"),
        ((p for p in (1, 2)), "whole numbers"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([[1], [1, 2]], "whole numbers"),
        ([True, False], "boolean mask with an entry for each token"),
        ([], "has nothing"),
        ([False] * 11, "has nothing"),
        (11, "has 11; a text of 11 tokens"),
        (2**80, f"has {2**80}"),
        ([1, -12], "has -12"),
        (slice(1.5, None), "slice indices must be integers"),
        (slice(0, 5, 0), "zero"),
    ],
    # A generator's own text has an address, which no two processes share.
    ids=lambda value: str(value) if not hasattr(value, "send") else "generator",
)
def test_positions_in_a_text_that_cannot_be_are_refused(lens, positions, message):
    with pytest.raises(ValueError, match=f"^positions.*{message}"):
        lens.explain(TEXT, positions, progress=False)
    if not hasattr(positions, "send"):  # a generator is used up
        with pytest.raises(ValueError, match=f"^position.*{message}"):
            lens.capture(TEXT, positions)
        for call in (
            lambda: lens.swap(TEXT, positions, np.ones(WIDTH)),
            lambda: lens.steer(TEXT, positions, "fox"),
            lambda: lens.write(TEXT, positions),
            lambda: lens.compare((TEXT, positions), (TEXT, 1)),
        ):
            with pytest.raises(ValueError, match=f"^position.*{message}"):
                call()


def test_one_position_is_not_several(lens):
    for call in (
        lambda: lens.swap(TEXT, [1, 2], np.ones(WIDTH)),
        lambda: lens.write(TEXT, [1, 2]),
        lambda: lens.compare((TEXT, 1), (TEXT, [1, 2])),
    ):
        with pytest.raises(ValueError, match="position must be one index, not 2"):
            call()


# --- numbers that are none ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_nan_and_infinity_are_refused(lens, tokens, bad):
    vector = np.ones(WIDTH)
    vector[3] = bad
    one = r"contains NaN or infinity \(1 of 32 numbers\)"
    for name, call in (
        ("replacement", lambda: lens.swap(TEXT, 3, vector)),
        ("activations", lambda: lens.decode(vector)),
        ("vector", lambda: lens.write_vector(vector)),
        ("a", lambda: lens.compare(vector, (TEXT, 1))),
        ("b", lambda: lens.compare((TEXT, 1), vector)),
    ):
        with pytest.raises(ValueError, match=f"^{name} {one}"):
            call()
    rows = np.ones((3, WIDTH), np.float32)
    with np.errstate(over="ignore"):
        rows[1] = vector
    with pytest.raises(
        ValueError, match=r"activations contains NaN or infinity in row 1 \(position 5"
    ):
        lens.model.swap(tokens, LAYER, [1, 5, 9], rows)
    with pytest.raises(ValueError, match="activations contains NaN or infinity in row 1;"):
        lens.decode(rows)


def test_other_things_than_vectors_are_refused(lens):
    with pytest.raises(ValueError, match="strength must be a finite number, not nan"):
        lens.steer(TEXT, 3, "fox", strength=float("nan"))
    with pytest.raises(ValueError, match="replacement must be an array of numbers"):
        lens.swap(TEXT, 3, ["fox"])
    with pytest.raises(ValueError, match="replacement must be an array of numbers"):
        lens.swap(TEXT, 3, np.ones(WIDTH) * 1j)
    with pytest.raises(ValueError, match=r"a must be \(text, position\), not 3 values"):
        lens.compare((TEXT, 1, 2), (TEXT, 1))
    with pytest.raises(ValueError, match=r"a must be \(text, position\) or an activation of 32"):
        lens.compare(np.ones(3), (TEXT, 1))
    with pytest.raises(ValueError, match="not nan"):
        lens.encode([np.nan])


# --- seeds --------------------------------------------------------------------------------------

ODD_SEEDS = (-1, 2**32, 2**32 + 7, 2**63, -(2**63) - 1, 2**64, 2**200, 10**6000)


def test_small_seeds_are_jaxs_and_numpys_and_all_others_differ():
    for seed in (0, 7, np.int64(7), 2**31, 2**32 - 1):
        data = lambda key: jax.random.key_data(key).tolist()
        assert data(random_key(seed)) == data(jax.random.key(int(seed)))
        assert numpy_seed(seed) == seed
    seeds = (0, 1, 7, 2**32 - 1, *ODD_SEEDS)
    assert len({tuple(jax.random.key_data(random_key(seed)).tolist()) for seed in seeds}) == 12
    assert len({numpy_seed(seed) for seed in seeds}) == 12 and numpy_seed(-1) > 0
    assert random_key(jnp.int32(7)) == random_key(7)


@pytest.mark.parametrize("seed", [3.0, "3", None, True, [3], np.array([1, 2])], ids=str)
def test_what_is_no_seed_is_refused(lens, seed):
    with pytest.raises(ValueError, match="seed must be a whole number"):
        random_key(seed)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        lens.explain(TEXT, 1, seed=seed)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        lens.write(TEXT, 1, seed=seed)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        lens.model.generate(TEXT, 2, temperature=1.0, seed=seed)


def test_seeds_of_any_size_give_samples_of_their_own(lens):
    settings = dict(decoding="sample", samples=4, progress=False, temperature=3.0)
    found = {}
    for seed in (7, *ODD_SEEDS[:5]):
        result = lens.explain(TEXTS, [1, 2], seed=seed, **settings)
        found[seed] = tuple(reading.text for row in result for reading in row.readings)
        assert f'"seed": {seed}' in result.to_json()
    assert len(set(found.values())) == len(found)
    again = lens.explain(TEXTS, [1, 2], seed=2**63, **settings)
    assert tuple(r.text for row in again for r in row.readings) == found[2**63]
    written = {
        tuple(np.asarray(lens.model.generate(TEXT, 8, temperature=3.0, seed=seed, stop=()))[0])
        for seed in (7, 2**32 + 7, 2**63 + 7, -7)
    }
    assert len(written) == 4


def test_seeds_of_orders_and_corpora_differ_too():
    orders = {tuple(batch_indices(64, 64, seed, 0)) for seed in (7, 2**32 + 7, 2**64 + 7)}
    assert len(orders) == 3
    # NumPy joins the words of numbers in a list: seed 2³² + 7, text 0 was seed 7, text 1.
    assert story(2**32 + 7, 0).text != story(7, 1).text
