"""A loaded language model with the everyday calls: logits, capture, swap, generate.

Capture and swap (activation patching) are plain, full forward passes; ``conlens_jax.lens.original``
has the cheap forms that training uses, whose tests compare them with these.
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
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.config.dtypes import run_dtype
from conlens_jax.config.seeds import random_key
from conlens_jax.files.paths import local_path
from conlens_jax.models import generate as generation
from conlens_jax.models import hf_io
from conlens_jax.models.arguments import finite_array, row_positions
from conlens_jax.models.hooks import HookPoint, boundaries, is_hook_point
from conlens_jax.models.hub import commit_of
from conlens_jax.models.param_table import Params
from conlens_jax.models.swapping import Swap, run_with_swap
from conlens_jax.models.tokenizer import Tokenizer
from conlens_jax.models.transformer import (
    add_position_embeddings,
    capture,
    embed_tokens,
    forward,
    positions_of,
    unembed,
)
from conlens_jax.models.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Weights, shape and identity of a model.

    Attributes:
      config: the shape, and how to run it.
      params: parameters, stacked over layers, on the mesh.
      folder: the Hugging Face folder it came from.
      model_id: the folder or hub id that was passed to :func:`load_model`.
      weights_hash: see :func:`conlens_jax.models.hf_io.weights_fingerprint`.
      revision: the commit of a hub id that was loaded, or the requested revision if the commit
        is unknown; empty for a folder.
    """

    config: TransformerConfig
    params: Params
    folder: Path
    model_id: str
    weights_hash: str
    revision: str = ""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_folder(self.folder)
        tokenizer.limit_to(self.config.vocab_size)
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
        layers: HookPoint | Sequence[HookPoint],
        positions: int | Sequence[int] | Int[Array, "B"] | Bool[Array, "B S"] | None = None,
        mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B D"] | Float[Array, "B n D"]:
        """The residual stream at the output of blocks; no block after the last of them is run.

        Args:
          tokens: token ids.
          layers: 0-based block, or several of them (``hidden_states[layer + 1]`` in Hugging Face
            terms; the last block's output before the final norm); or names of hook points such as
            ``"blocks.5.hook_resid_post"``, see :func:`conlens_jax.models.hooks.boundaries`.
          positions: index into the sequence, one for all rows or one per row; a negative one
            counts from a row's last real token, so that padding is never captured. Or a boolean
            mask [S] or [B, S] with one token of each row. None captures every position,
            padding too, as a last-but-one dimension S.
          mask: False on padding.

        Returns:
          [B, D] for one layer, [B, n, D] for a sequence of n; with ``positions=None`` [B, S, D]
          and [B, n, S, D].

        Raises:
          ValueError: an unknown hook point, or a position out of range or on padding.
        """
        wanted = (layers,) if is_hook_point(layers) else tuple(layers)
        at = boundaries(wanted, self.config.n_layers, self.model_id)
        real = mask  # the caller's, as NumPy: inside a jit, JAX arrays have no values
        tokens, mask = _inputs(tokens, mask, self.config)
        outputs_of = tuple(boundary - 1 for boundary in at)
        captured = _capture(self.params, tokens, mask, config=self.config, layer=outputs_of)
        if positions is not None:
            rows = jnp.arange(tokens.shape[0])
            captured = captured[rows, :, row_positions(positions, _real(real, tokens.shape))]
        return captured[:, 0] if is_hook_point(layers) else captured

    def swap(
        self,
        tokens: Int[Array, "B S"],
        layer: HookPoint,
        positions: int | Sequence[int] | Int[Array, "B"],
        activations: Float[Array, "B D"],
        mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits where the output of block ``layer`` at ``positions`` is ``activations``.

        ``layer`` and ``positions`` are as for :meth:`capture`, with one hook point for all rows.

        Raises:
          ValueError: as :meth:`capture`, or activations with NaN or infinity.
        """
        real = mask
        tokens, mask = _inputs(tokens, mask, self.config)
        swap = self._swap(layer, positions, activations, _real(real, tokens.shape))
        return _swapped(self.params, tokens, mask, swap, config=self.config)

    def generate(
        self,
        prompt: str | Sequence[str] | Int[Array, "B S"],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        mask: Bool[Array, "B S"] | None = None,
        stop: Sequence[int] | None = None,
        add_bos: bool | str = "auto",
        swap: tuple[HookPoint, int | Sequence[int] | Int[Array, "B"], Float[Array, "B D"]]
        | None = None,
    ) -> Int[Array, "B T"]:
        """Token ids that follow each prompt; :meth:`decode` makes text of them.

        Args:
          prompt: token ids, padded on either side; or one text or several.
          max_new_tokens: T, how many to generate.
          temperature: 0 takes the most probable token, above 0 samples from the softmax of
            logits / temperature.
          top_p: samples come from the most probable tokens that together have this probability.
          seed: of the samples, any whole number. Rows are independent; the same call returns the
            same tokens.
          mask: False on padding; only for token ids.
          stop: tokens that end a row, which then repeats its last one. None: the model's own
            (``config.eos_token_ids``); ``()``: no row ends early.
          add_bos: whether texts begin with the bos token. ``"auto"``: if the tokenizer's own
            template adds one, as in transformers. It is never added twice.
          swap: layer, positions and activations as for :meth:`swap`: what follows is written after
            the prompt with that swap.

        Raises:
          ValueError: a setting out of range, a prompt without a token, or more tokens than the
            model has positions; as :meth:`swap`.
        """
        tokens, mask = self._prompt(prompt, mask, add_bos)
        longest = int(np.max(np.sum(mask, axis=1), initial=0))
        _check_generation(max_new_tokens, temperature, top_p)
        if not np.all(np.any(mask, axis=1)):
            raise ValueError("prompt: every row must have at least one token")
        if longest + max_new_tokens > self.config.max_positions:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are more than "
                f"the {self.config.max_positions} positions of {self.model_id}"
            )
        if stop is None:
            stop = self.config.eos_token_ids
        room = ((0, 0), (0, generation.bucket(tokens.shape[1]) - tokens.shape[1]))
        written_BT = generation.generate(
            self.params,
            jnp.pad(tokens, room),
            jnp.pad(mask, room),
            jnp.int32(max_new_tokens),
            random_key(seed) if temperature else None,
            jnp.float32(temperature),
            jnp.float32(top_p) if top_p < 1 else None,
            jnp.asarray(stop, jnp.int32),
            None if swap is None else self._swap(*swap, np.asarray(mask)),
            slots=generation.bucket(max_new_tokens),
            config=self.config,
        )
        return written_BT[:, :max_new_tokens]

    def decode(self, tokens: Int[Array, "B T"]) -> list[str]:
        """The text of each row, special tokens left out."""
        return [self.tokenizer.decode(row) for row in np.asarray(tokens)]

    def _swap(self, layer: HookPoint, positions, activations, real_BS: np.ndarray) -> Swap:
        """A swap whose arguments have been checked; see :meth:`swap`."""
        (boundary,) = boundaries((layer,), self.config.n_layers, self.model_id)
        activations = _row_vectors(activations, len(real_BS), self.config.d_model)
        positions = row_positions(positions, real_BS)
        if not isinstance(activations, jax.core.Tracer):
            finite_array(activations, "activations", positions)
        return Swap(positions, activations, boundary)

    def _prompt(self, prompt, mask, add_bos: bool | str) -> tuple[Array, Array]:
        """Tokens and mask; texts are padded on the left."""
        if not _is_text(prompt):
            return _inputs(prompt, mask, self.config)
        if mask is not None:
            raise ValueError("mask is for token ids only; texts get their own")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [np.asarray(self.tokenizer.encode(text, add_bos), np.int32) for text in texts]
        tokens = np.full((len(rows), max(map(len, rows))), self.tokenizer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(rows):
            tokens[row, tokens.shape[1] - len(ids) :] = ids
            mask[row, tokens.shape[1] - len(ids) :] = True
        return _inputs(tokens, mask, self.config)


def load_model(
    folder_or_id: str | Path,
    dtype: DTypeLike = "float32",
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
      dtype: of parameters and computation, independent of the files: float32 or bfloat16, by
        name or as a dtype.
      unroll, remat, attention: how to run it; see :class:`conlens_jax.config.ModelConfig`.
      quantise: ``"int8"`` for frozen int8 matrices (:mod:`conlens_jax.models.quantized`).
      before_loading: called with the shape before any weight is read.

    Raises:
      ValueError: not a supported model, or files that do not match its config.json, with every
        problem listed; an unsupported dtype, such as float16.
    """
    dtype = run_dtype(dtype)
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
        revision="" if local_path(folder_or_id) == folder else commit_of(folder) or revision,
    )


def _inputs(tokens, mask, config: TransformerConfig) -> tuple[Array, Array]:
    """Checks and converts. Raises ValueError for a wrong shape or a token outside the vocabulary,
    which the embedding would silently turn into NaN."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be whole numbers [B, S], not {tokens.dtype} {tokens.shape}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise ValueError(f"tokens must be 0 to {config.vocab_size - 1}, the model's vocabulary")
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {mask.shape}, tokens {tokens.shape}")
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, bool)


def _is_text(prompt) -> bool:
    return isinstance(prompt, str) or (
        isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], str)
    )


def _check_generation(max_new_tokens: int, temperature: float, top_p: float) -> None:
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if temperature < 0:
        problems.append(f"temperature must not be negative, not {temperature}")
    if not 0 < top_p <= 1:
        problems.append(f"top_p must be above 0 and at most 1, not {top_p}")
    if problems:
        raise ValueError("; ".join(problems))


def _real(mask, shape: tuple[int, ...]) -> np.ndarray:
    """Which tokens are not padding."""
    return np.ones(shape, bool) if mask is None else np.asarray(mask, bool)


def _row_vectors(activations, batch: int, width: int) -> Float[Array, "B D"]:
    """[B, D], or [B, 1, D] as ``capture`` returns it for a list of one layer."""
    activations = jnp.asarray(activations)
    if activations.shape not in ((batch, width), (batch, 1, width)):
        raise ValueError(f"activations have shape {activations.shape}, not {(batch, width)}")
    return activations.reshape(batch, width)


@functools.partial(jax.jit, static_argnames="config")
def _logits(params, tokens, mask, *, config):
    return forward(params, tokens, config=config, mask_BS=mask)


_capture = jax.jit(capture, static_argnames=("config", "layer"))


@functools.partial(jax.jit, static_argnames="config")
def _swapped(params, tokens, mask, swap, *, config):
    positions_BS = positions_of(mask)
    x_BSD = embed_tokens(params, tokens, config)
    x_BSD = add_position_embeddings(params, x_BSD, positions_BS, config)
    x_BSD, _ = run_with_swap(params["layers"], x_BSD, positions_BS, swap, config=config)
    return unembed(params, x_BSD, config=config)
