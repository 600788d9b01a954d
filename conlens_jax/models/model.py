"""A loaded language model with the three calls of everyday work: logits, capture, swap.

These are the plain, full forward passes; ``conlens_jax.lens.original`` has the cheap forms that
training uses, and its tests hold them against these.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.data.tokenizer import Tokenizer, check_vocabulary
from conlens_jax.models import hf_io
from conlens_jax.models.layer_kinds import slice_layers
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer import (
    embed_tokens,
    enter,
    forward,
    positions_of,
    run_layers,
    unembed,
)
from conlens_jax.models.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Weights and shape of a model, and who it is.

    Attributes:
      config: shape, and how to run it.
      params: parameters, stacked over layers, on the mesh.
      folder: the Hugging Face folder it came from.
      model_id: the name it was asked for by.
      weights_hash: see :func:`conlens_jax.models.hf_io.weights_fingerprint`.
    """

    config: TransformerConfig
    params: Params
    folder: Path
    model_id: str
    weights_hash: str

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_folder(self.folder)
        check_vocabulary(tokenizer, self.config.vocab_size)
        return tokenizer

    def logits(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Next-token logits, fp32. ``mask`` is False on padding (left or right)."""
        return _logits(self.params, *_inputs(tokens, mask, self.config), config=self.config)

    def capture(
        self,
        tokens: Int[Array, "B S"],
        layers: int | Sequence[int],
        positions: int | Sequence[int] | Int[Array, "B"] | None = None,
        mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B D"] | Float[Array, "B n D"]:
        """The residual stream at the output of blocks; stops at the last one asked for.

        Args:
          tokens: token ids.
          layers: 0-based block, or several of them (``hidden_states[layer + 1]`` in Hugging Face
            terms; the last block's output before the final norm).
          positions: index into the sequence, one for all rows or one a row; None gives all of
            them, as a last-but-one dimension S.
          mask: False on padding.

        Returns:
          [B, D] for one layer, [B, n, D] for a sequence of n; with ``positions=None`` [B, S, D]
          and [B, n, S, D].
        """
        wanted = (layers,) if isinstance(layers, int | np.integer) else tuple(layers)
        self._check_layers(wanted)
        tokens, mask = _inputs(tokens, mask, self.config)
        captured = _capture(
            self.params, tokens, mask, layers=tuple(map(int, wanted)), config=self.config
        )
        if positions is not None:
            rows = jnp.arange(tokens.shape[0])
            captured = captured[rows, :, _row_positions(positions, tokens)]
        return captured[:, 0] if isinstance(layers, int | np.integer) else captured

    def swap(
        self,
        tokens: Int[Array, "B S"],
        layer: int,
        positions: int | Sequence[int] | Int[Array, "B"],
        activations: Float[Array, "B D"],
        mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits where the output of block ``layer`` at ``positions`` is ``activations``."""
        self._check_layers((layer,))
        tokens, mask = _inputs(tokens, mask, self.config)
        activations = _row_vectors(activations, tokens.shape[0], self.config.d_model)
        positions = _row_positions(positions, tokens)
        return _swap(
            self.params, tokens, mask, positions, activations, layer=int(layer), config=self.config
        )

    def _check_layers(self, layers: Sequence[int]) -> None:
        wrong = [layer for layer in layers if not 0 <= layer < self.config.n_layers]
        if wrong:
            raise ValueError(
                f"layer {', '.join(map(str, wrong))} is out of range: "
                f"{self.model_id} has layers 0 to {self.config.n_layers - 1} (model.layer)"
            )


def load_model(
    folder_or_id: str | Path,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    revision: str = "",
    unroll: int = 0,
    remat: str = "none",
    attention: str = "xla",
    quantise: str = "",
    before_loading: Callable[[TransformerConfig], object] = lambda config: None,
) -> LanguageModel:
    """Loads a Hugging Face model folder or hub id onto a mesh (default: the first device).

    Args:
      unroll, remat, attention: how it is run; see :class:`conlens_jax.config.ModelConfig`.
      quantise: ``"int8"`` for frozen int8 matrices (:mod:`conlens_jax.models.quantized`).
      before_loading: called when the shape is known and no weight has been read.

    Raises:
      ValueError: not a supported model, or its files do not fit its config.json; every problem
        is listed.
    """
    folder = hf_io.resolve_folder(str(folder_or_id), revision)
    config = dataclasses.replace(
        hf_io.read_config(folder),
        dtype=dtype,
        unroll=unroll,
        remat=remat,
        attention=attention,
        quantise=quantise,
    )
    before_loading(config)
    return LanguageModel(
        config=config,
        params=hf_io.load_params(folder, config, mesh),
        folder=folder,
        model_id=str(folder_or_id),
        weights_hash=hf_io.weights_fingerprint(folder),
    )


def _inputs(tokens, mask, config: TransformerConfig) -> tuple[Array, Array]:
    """Checks and converts. Raises ValueError for a wrong shape or a token outside the vocabulary,
    which the embedding would turn into NaN without a word."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be whole numbers [B, S], not {tokens.dtype} {tokens.shape}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise ValueError(f"tokens must be 0 to {config.vocab_size - 1}, the model's vocabulary")
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {mask.shape}, tokens {tokens.shape}")
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, bool)


def _row_positions(positions, tokens: Array) -> Int[Array, "B"]:
    """One position a row. Raises ValueError out of range."""
    batch, length = tokens.shape
    values = np.asarray(positions)
    if values.shape not in ((), (1,), (batch,), (batch, 1)):
        raise ValueError(
            f"positions has shape {values.shape}; it must be one index or one for each of the "
            f"{batch} rows"
        )
    if values.min() < -length or values.max() >= length:
        raise ValueError(f"positions must be below the sequence length {length}")
    return jnp.broadcast_to(jnp.asarray(values.reshape(-1) % length, jnp.int32), (batch,))


def _row_vectors(activations, batch: int, width: int) -> Float[Array, "B D"]:
    """[B, D], or [B, 1, D] as ``capture`` gives it for a list of one layer."""
    activations = jnp.asarray(activations)
    if activations.shape not in ((batch, width), (batch, 1, width)):
        raise ValueError(f"activations have shape {activations.shape}, not {(batch, width)}")
    return activations.reshape(batch, width)


@functools.partial(jax.jit, static_argnames="config")
def _logits(params, tokens, mask, *, config):
    return forward(params, tokens, config=config, mask_BS=mask)


@functools.partial(jax.jit, static_argnames=("layers", "config"))
def _capture(params, tokens, mask, *, layers, config):
    positions = positions_of(mask)
    x_BSD = enter(params, embed_tokens(params, tokens, config), positions)
    captured, start = {}, 0
    for stop in sorted({layer + 1 for layer in layers}):
        piece = slice_layers(params["layers"], start, stop)
        x_BSD, _ = run_layers(piece, x_BSD, positions, config=config)
        captured[stop - 1], start = x_BSD, stop
    return jnp.stack([captured[layer] for layer in layers], axis=1)


@functools.partial(jax.jit, static_argnames=("layer", "config"))
def _swap(params, tokens, mask, positions, activations, *, layer, config):
    token_positions = positions_of(mask)
    x_BSD = enter(params, embed_tokens(params, tokens, config), token_positions)
    lower = slice_layers(params["layers"], 0, layer + 1)
    upper = slice_layers(params["layers"], layer + 1, config.n_layers)
    x_BSD, _ = run_layers(lower, x_BSD, token_positions, config=config)
    rows = jnp.arange(tokens.shape[0])
    x_BSD = x_BSD.at[rows, positions].set(activations.astype(x_BSD.dtype))
    x_BSD, _ = run_layers(upper, x_BSD, token_positions, config=config)
    return unembed(params, x_BSD, config=config)
