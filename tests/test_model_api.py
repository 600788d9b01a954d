"""The calls of everyday work: ``load_model(folder)``, ``logits``, ``capture``, ``swap``."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_tokens, write_tiny_folder, write_tokenizer

import conlens_jax

LENGTH, BATCH = 10, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_folder(folder)
    return conlens_jax.load_model(folder, unroll=1)  # compiles faster


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(BATCH, LENGTH)


@pytest.fixture(scope="module")
def logits(model, tokens):
    return np.asarray(model.logits(tokens))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_swapping_in_the_captured_value_changes_no_logit(model, tokens, logits, layer):
    """Capture and swap act on the same tensor, at the same position."""
    for positions in ([0, 0], [4, LENGTH - 1], [3, 8]):
        captured = model.capture(tokens, layer, positions)
        swapped = model.swap(tokens, layer, positions, captured)
        np.testing.assert_allclose(swapped, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_swapping_in_another_vector_changes_the_logits_from_there_on(model, tokens, logits, layer):
    positions = np.array([3, 8])
    other = np.asarray(model.capture(tokens, layer, positions)) + 0.5
    change = np.abs(np.asarray(model.swap(tokens, layer, positions, other)) - logits).max(axis=-1)
    for row, position in enumerate(positions):
        assert change[row, :position].max() < 1e-5
        assert change[row, position] > 0.05
        later = change[row, position + 1 :]
        # Behind the last block nothing carries the change on to later positions.
        assert later.max() < 1e-5 if layer == 2 else later.min() > 1e-4


def test_the_neighbouring_tensor_is_another(model, tokens, logits):
    """The input of a block, or the next position, swapped in for its output, is seen."""
    captured = np.asarray(model.capture(tokens, (0, 1), None))
    for wrong in (captured[:, 0, 4], captured[:, 1, 5]):
        assert np.abs(np.asarray(model.swap(tokens, 1, 4, wrong)) - logits).max() > 0.05


def test_swap_under_padding(model, tokens, logits):
    """Positions count from the start of the padded row."""
    mask = np.ones((BATCH, LENGTH), bool)
    mask[1, :3] = False
    padded = np.asarray(model.logits(tokens, mask))
    captured = model.capture(tokens, 1, [4, 5], mask)
    swapped = np.asarray(model.swap(tokens, 1, [4, 5], captured, mask))
    np.testing.assert_allclose(swapped[mask], padded[mask], rtol=0, atol=1e-5)
    assert np.abs(padded - logits)[1, 3:].max() > 0.01
    np.testing.assert_allclose(padded[0], logits[0], rtol=0, atol=1e-5)


def test_shapes_are_batch_first(model, tokens):
    width, vocab = model.config.d_model, model.config.vocab_size
    assert model.logits(tokens).shape == (BATCH, LENGTH, vocab)
    assert model.logits(tokens).dtype == jnp.float32
    assert model.capture(tokens, 1, 4).shape == (BATCH, width)
    assert model.capture(tokens, 1).shape == (BATCH, LENGTH, width)
    assert model.capture(tokens, (1,), 4).shape == (BATCH, 1, width)
    assert model.capture(tokens, [0, 2], 4).shape == (BATCH, 2, width)
    assert model.capture(tokens, [0, 2], None).shape == (BATCH, 2, LENGTH, width)
    assert model.swap(tokens, 1, 4, np.zeros((BATCH, width))).shape == (BATCH, LENGTH, vocab)


def test_several_layers_come_in_the_order_asked_for(model, tokens):
    both = np.asarray(model.capture(tokens, (0, 2), None))
    turned = np.asarray(model.capture(tokens, (2, 0), None))
    np.testing.assert_array_equal(both, turned[:, ::-1])
    np.testing.assert_allclose(both[:, 1], model.capture(tokens, 2), rtol=0, atol=1e-6)
    assert np.abs(both[:, 0] - both[:, 1]).max() > 0.1


def test_numpy_jax_and_lists_give_the_same(model, tokens, logits):
    for same in (jnp.asarray(tokens), tokens.astype(np.int64), tokens.tolist()):
        np.testing.assert_array_equal(model.logits(same), logits)
    expected = np.asarray(model.capture(tokens, 1, None))[[0, 1], [3, 8]]
    for positions in ([3, 8], (3, 8), np.array([3, 8]), jnp.array([3, 8]), [[3], [8]]):
        np.testing.assert_array_equal(model.capture(tokens, np.int64(1), positions), expected)
    np.testing.assert_array_equal(model.capture(tokens, 1, [3 - LENGTH, 8 - LENGTH]), expected)
    single = np.asarray(model.capture(tokens, 1, None))[:, 3]
    for position in (3, np.int32(3), jnp.int32(3), [3], 3 - LENGTH):
        np.testing.assert_array_equal(model.capture(tokens, 1, position), single)
    swapped = model.swap(tokens, 1, 3, np.ones(single.shape, np.float64))
    np.testing.assert_array_equal(swapped, model.swap(tokens, 1, [3, 3], jnp.ones(single.shape)))


def test_capture_stops_at_its_layer(model, tokens):
    """Layers above are not run: they cost nothing, and NaN in them does not arrive."""
    poisoned = {
        **model.params,
        "layers": jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), model.params["layers"]),
        "final_norm": jnp.full_like(model.params["final_norm"], jnp.nan),
    }
    broken = dataclasses.replace(model, params=poisoned)
    expected = np.asarray(model.capture(tokens, (0, 1), None))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(broken.capture(tokens, (0, 1), None), expected)
    assert np.isnan(broken.capture(tokens, (0, 2), None)[:, 1]).all()

    def flops(layer):
        # Unrolled: the body of a scan is counted only once.
        config = dataclasses.replace(model.config, unroll=0)

        def capture(params):
            return dataclasses.replace(model, config=config, params=params).capture(tokens, layer)

        return jax.jit(capture).lower(model.params).compile().cost_analysis()["flops"]

    assert flops(0) < 0.4 * flops(2)


def test_places_by_name(model, tokens, logits):
    """TransformerLens' and transformers' names are the same tensors as the layers' numbers."""
    states = np.asarray(model.capture(tokens, (0, 1, 2)))
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    np.testing.assert_array_equal(model.capture(tokens, names), states)
    np.testing.assert_array_equal(model.capture(tokens, names[1]), states[:, 1])
    inputs = np.asarray(model.capture(tokens, [f"blocks.{k}.hook_resid_pre" for k in range(3)]))
    np.testing.assert_array_equal(inputs[:, 1:], states[:, :2])
    np.testing.assert_array_equal(inputs[:, 0], np.asarray(model.params["embedding"])[tokens])
    np.testing.assert_array_equal(
        model.capture(tokens, ["hidden_states[0]", "hidden_states[2]", 0]),
        np.stack([inputs[:, 0], inputs[:, 2], states[:, 0]], axis=1),
    )
    for name in (*names, "blocks.0.hook_resid_pre", "hidden_states[1]"):
        value = np.asarray(model.capture(tokens, name, [3, 8]))
        swapped = model.swap(tokens, name, [3, 8], value)
        np.testing.assert_allclose(swapped, logits, rtol=0, atol=1e-5)
        change = np.abs(np.asarray(model.swap(tokens, name, [3, 8], value + 0.5)) - logits)
        assert change[0, :3].max() < 1e-5 and change[0, 3].max() > 0.05


@pytest.mark.parametrize(
    "name",
    [
        "blocks.3.hook_resid_post",
        "blocks.1.hook_resid",
        "hook_embed",
        "hidden_states[3]",
        "blocks.1.hook_resid_post ",
    ],
)
def test_places_that_there_are_not(model, tokens, name):
    with pytest.raises(ValueError) as error:
        model.capture(tokens, [0, name])
    for said in (f"layer {name} is out of range", "layers 0 to 2", "hook_resid_pre"):
        assert said in str(error.value)


@pytest.mark.parametrize("layer", [3, -1, (0, 7)])
def test_layer_out_of_range(model, tokens, layer):
    wrong = layer[-1] if isinstance(layer, tuple) else layer
    with pytest.raises(ValueError, match=rf"layer {wrong} is out of range.*layers 0 to 2"):
        model.capture(tokens, layer, 0)
    if isinstance(layer, int):
        with pytest.raises(ValueError, match="out of range"):
            model.swap(tokens, layer, 0, np.zeros((BATCH, 32)))


@pytest.mark.parametrize("positions", [LENGTH, -LENGTH - 1, [0, LENGTH]], ids=str)
def test_position_out_of_range(model, tokens, positions):
    with pytest.raises(ValueError, match=f"positions must be below the sequence length {LENGTH}"):
        model.capture(tokens, 1, positions)
    with pytest.raises(ValueError, match="positions must be below"):
        model.swap(tokens, 1, positions, np.zeros((BATCH, 32)))


def test_wrong_number_of_positions(model, tokens):
    with pytest.raises(ValueError, match=r"positions has shape \(3,\).*each of the 2 rows"):
        model.capture(tokens, 1, [1, 2, 3])


def test_tokenizer_of_the_folder(model):
    assert model.tokenizer.encode("word7 word9") == [7, 9]
    assert model.model_id == str(model.folder)


def test_tokenizer_larger_than_the_embedding(model, tmp_path):
    """An embedding may have rows to spare; what it has no row for, no text may use."""
    for vocab_size in (model.config.vocab_size - 8, model.config.vocab_size):
        write_tokenizer(tmp_path, vocab_size)
        fitting = dataclasses.replace(model, folder=tmp_path)
        assert fitting.tokenizer.vocab_size == vocab_size
    write_tokenizer(tmp_path, model.config.vocab_size + 1)
    larger = dataclasses.replace(model, folder=tmp_path)
    assert larger.generate("word47 word5", 2, stop=()).shape == (1, 2)
    with pytest.raises(ValueError, match=r"'word48' with id 48, .* only 48 rows"):
        larger.generate("word5 word48", 2)
