"""A row of the table against hand-written slicing of the file's tensor, both ways."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_models import tiny_config

from conlens_jax.models.param_table import ParamRow, Piece

CONFIG = dataclasses.replace(
    tiny_config(num_hidden_layers=2, head_dim=6, num_key_value_heads=2), n_experts=3
)
D, H, K, X, F, E = 32, 4, 2, 6, 40, 3
KV_END = (H + K) * X


def heads(matrix, n):
    """[in, n·X] → [in, n, X]."""
    return matrix.reshape(*matrix.shape[:-1], n, X)


# Each case: dims, layout, piece, the tensor's shape, and what the model's own code does with it.
CASES = {
    "linear": ("DHX", "linear", None, (H * X, D), lambda t: heads(t.T, H)),
    "linear back": ("HXD", "linear", None, (D, H * X), lambda t: t.T.reshape(H, X, D)),
    "conv1d": ("DF", "conv1d", None, (D, F), lambda t: t),
    "conv1d back": ("HXD", "conv1d", None, (H * X, D), lambda t: t.reshape(H, X, D)),
    "same": ("VD", "same", None, (48, D), lambda t: t),
    "bias": ("HX", "same", None, (H * X,), lambda t: t.reshape(H, X)),
    "router": ("DE", "linear", None, (E, D), lambda t: t.T),
    # Phi-3: query, key and value are slices of qkv_proj's output, one behind the other.
    "phi3 query": (
        "DHX",
        "linear",
        Piece(0, ("HX", "KX", "KX")),
        ((H + 2 * K) * X, D),
        lambda t: heads(t[: H * X].T, H),
    ),
    "phi3 value": (
        "DKX",
        "linear",
        Piece(2, ("HX", "KX", "KX")),
        ((H + 2 * K) * X, D),
        lambda t: heads(t[KV_END:].T, K),
    ),
    # Falcon 40B: qkv.view(…, kv_heads, heads // kv_heads + 2, head_dim), and [:, :, :, :-2].
    "falcon 40b query": (
        "DHX",
        "linear",
        Piece(0, ("HX", "KX", "KX"), by="K"),
        ((H + 2 * K) * X, D),
        lambda t: heads(t.reshape(K, H // K + 2, X, D)[:, :-2].reshape(H * X, D).T, H),
    ),
    "falcon 40b value bias": (
        "KX",
        "same",
        Piece(2, ("HX", "KX", "KX"), by="K"),
        ((H + 2 * K) * X,),
        lambda t: t.reshape(K, H // K + 2, X)[:, -1],
    ),
    # Phi-3: gate, up = gate_up_proj(x).chunk(2, dim=-1).
    "phi3 up": ("DF", "linear", Piece(1, ("F", "F")), (2 * F, D), lambda t: t[F:].T),
    # GPT-2: c_attn(x).split(D, dim=2), and the Conv1D holds [in, out].
    "gpt2 key": (
        "DHX",
        "conv1d",
        Piece(1, ("HX", "HX", "HX")),
        (D, 3 * H * X),
        lambda t: heads(t[:, H * X : 2 * H * X], H),
    ),
    "gpt2 value bias": (
        "HX",
        "same",
        Piece(2, ("HX", "HX", "HX")),
        (3 * H * X,),
        lambda t: heads(t[2 * H * X :], H),
    ),
    # GPT-NeoX: qkv.view(…, heads, 3 · head_size).chunk(3, dim=-1).
    "neox value": (
        "DHX",
        "linear",
        Piece(2, ("HX", "HX", "HX"), by="H"),
        (3 * H * X, D),
        lambda t: np.stack([t.T[:, (3 * h + 2) * X : (3 * h + 3) * X] for h in range(H)], 1),
    ),
    "neox query bias": (
        "HX",
        "same",
        Piece(0, ("HX", "HX", "HX"), by="H"),
        (3 * H * X,),
        lambda t: t.reshape(H, 3, X)[:, 0],
    ),
    # gpt-oss: gate, up = gate_up[..., ::2], gate_up[..., 1::2], all experts in one tensor.
    "gpt-oss gate": (
        "EDF",
        "conv1d",
        Piece(0, ("F", "F"), by="last"),
        (E, D, 2 * F),
        lambda t: t[..., ::2],
    ),
    "gpt-oss up bias": (
        "EF",
        "same",
        Piece(1, ("F", "F"), by="last"),
        (E, 2 * F),
        lambda t: t[..., 1::2],
    ),
    "gpt-oss down": ("EFD", "conv1d", None, (E, F, D), lambda t: t),
    "stacked experts, linear": ("EDF", "linear", None, (E, F, D), lambda t: t.swapaxes(1, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_view_of_a_tensor(case):
    dims, layout, piece, shape, expected = CASES[case]
    row = ParamRow(("layers", "w"), "N" + dims, "h.{layer}.w", layout, piece=piece)
    assert row.hf_shape(CONFIG) == shape
    tensor = np.random.default_rng(0).standard_normal(shape)
    view = row.view(tensor, CONFIG)
    np.testing.assert_array_equal(view, expected(tensor))
    assert view.shape == row.layer_shape(CONFIG)
    # Heads that are not equally far apart are no view.
    assert np.shares_memory(view, tensor) == (case != "falcon 40b query")


@pytest.mark.parametrize(
    ("of", "by"), [(("HX", "KX", "KX"), ""), (("HX", "KX", "KX"), "K"), (("F", "F"), "")]
)
def test_pieces_written_give_the_tensor_back(of, by):
    rows = [
        ParamRow(("p",), "D" + dims, "w", "linear", piece=Piece(index, of, by))
        for index, dims in enumerate(of)
    ]
    tensor = np.random.default_rng(1).standard_normal(rows[0].hf_shape(CONFIG))
    written = np.full_like(tensor, np.nan)
    for row in rows:
        row.write(written, row.view(tensor, CONFIG), CONFIG)
    np.testing.assert_array_equal(written, tensor)


def test_names_of_a_tensor_per_layer_and_expert():
    row = ParamRow(("layers", "up"), "NEDF", "model.layers.{layer}.experts.{expert}.w3.weight")
    assert row.hf_shape(CONFIG) == (F, D)
    names = dict(row.tensor_names(CONFIG))
    assert len(names) == 2 * E
    assert names[1, 2] == "model.layers.1.experts.2.w3.weight"
    assert dict(ParamRow(("norm",), "D", "norm.weight", "same").tensor_names(CONFIG)) == {
        (): "norm.weight"
    }
    assert row.matrix_dims == ("D", "F")


def test_names_of_a_tensor_per_head():
    row = ParamRow(("layers", "key_norm"), "NKX", "h.{layer}.norms.{head}.weight", "same")
    names = dict(row.tensor_names(CONFIG))
    assert names[1, 1] == "h.1.norms.1.weight" and len(names) == CONFIG.n_layers * CONFIG.n_kv_heads
    assert row.hf_shape(CONFIG) == (CONFIG.head_dim,)


def test_parts_that_cannot_be_joined_by_a_letter():
    with pytest.raises(ValueError, match=r"Piece\.by='H'.*must begin with it"):
        Piece(0, ("HX", "KX"), by="H")
