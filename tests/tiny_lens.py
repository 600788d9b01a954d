"""A tiny lens for tests, and the lens again in its plainest form: the oracle.

The oracle runs the whole prefix through the model for every token, samples with one-hot vectors
``hard + soft − stop_gradient(soft)``, and leaves every gradient to autodiff. It shares with the
library only the transformer itself. (:func:`text_logits` is the library's, for comparison.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import random_params, random_tokens, tiny_config

from conlens_jax.config import LensConfig
from conlens_jax.lens.batch import Batch
from conlens_jax.lens.decoder import decoder_head, teacher_forced_states
from conlens_jax.lens.history import text_states
from conlens_jax.lens.original import capture
from conlens_jax.lens.spec import LensSpec, init_lens
from conlens_jax.models import transformer
from conlens_jax.models.embeddings import (
    add_position_embeddings,
    as_embedding,
    embed_tokens,
    scale_embeddings,
    token_table,
)
from conlens_jax.models.layer_kinds import slice_layers
from conlens_jax.models.param_table import Params
from conlens_jax.models.quantized import matmul
from conlens_jax.models.transformer import (
    all_positions,
    positions_of,
    run_layers,
    run_part,
    unembed,
)

TEXT_LEN, LAYER, BATCH, CONTEXT = 4, 1, 8, 12


def tiny_spec(
    *,
    family: str = "llama",
    layer: int = LAYER,
    tied: bool = False,
    bos: int | None = 1,
    dtype: str = "float32",
    remat: str = "none",
    **lens: Any,
) -> LensSpec:
    """Prompts on both sides of the slot and of the text; ``lens`` are fields of LensConfig."""
    model = tiny_config(family, tie_word_embeddings=tied)
    return LensSpec(
        # A scan of one layer a step compiles fastest.
        model=dataclasses.replace(model, unroll=1, dtype=dtype, remat=remat),
        layer=layer,
        lens=LensConfig(**{"text_len": TEXT_LEN, "history_gradient": "exact", **lens}),
        decoder_left=(1, 5, 6),
        decoder_right=(7,),
        encoder_left=(1, 8),
        encoder_right=(9, 10),
        bos=bos,
    )


def tiny_original(spec: LensSpec, seed: int = 0) -> Params:
    """Random weights, with embeddings large enough that predictions differ and tokens matter."""
    params = random_params(spec.model, seed)
    # A tied embedding that is too large only repeats the last token.
    gain = 2 if spec.model.tied_embeddings else 4
    louder = {name: gain * params[name] for name in ("embedding", "output_head") if name in params}
    return params | louder


def tiny_lens(spec: LensSpec, seed: int = 0) -> tuple[Params, Params]:
    """(trainable, frozen) as if trained: no part is at its initial value or at the original's."""
    rng = np.random.default_rng(seed + 100)
    mean_D = 0.3 * rng.standard_normal(spec.model.d_model)
    trainable, frozen = init_lens(tiny_original(spec, seed), spec, mean_D, 0.7)

    def moved(tree: Params) -> Params:
        move = lambda leaf: leaf + (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return jax.tree.map(lambda leaf: jnp.asarray(move(np.asarray(leaf))), tree)

    frozen |= {side: moved(frozen[side]) for side in ("decoder", "encoder")}
    return moved(trainable), frozen


def tiny_batch(spec: LensSpec, original: Params, batch: int = BATCH, seed: int = 0) -> Batch:
    """True activations at positions 3 … length − 4 of right-padded contexts of unequal length."""
    rng = np.random.default_rng(seed + 200)
    tokens_BS = random_tokens(batch, CONTEXT, seed=seed)
    lengths_B = rng.integers(CONTEXT - 3, CONTEXT + 1, batch).astype(np.int32)
    positions_B = rng.integers(3, lengths_B - 3).astype(np.int32)
    mask_BS = np.arange(CONTEXT) < lengths_B[:, None]
    tokens_BS = np.where(mask_BS, tokens_BS, 0)
    states_BSD = captured(original, tokens_BS, mask_BS, spec=spec)
    activation_BD = states_BSD[np.arange(batch), positions_B].astype(jnp.float32)
    return Batch(
        activation_BD,
        jnp.asarray(tokens_BS),
        jnp.asarray(lengths_B),
        jnp.asarray(positions_B),
        jnp.arange(batch, dtype=jnp.int32),
    )


def text_logits(decoder, activation_BD, text_BT, noise, tau, spec, keys_BT=None) -> jax.Array:
    """Logits of D's own text, with the gradient through its sampled history."""
    states = text_states(decoder, activation_BD, text_BT, noise, tau, spec, keys_BT)
    return decoder_head(decoder, spec).logits(states)


def teacher_forced_logits(decoder, activation_BD, text_BT, *, spec: LensSpec) -> jax.Array:
    """Logits of a given text, as the library computes their states."""
    states = teacher_forced_states(decoder, activation_BD, text_BT, spec=spec)
    return decoder_head(decoder, spec).logits(states)


captured = jax.jit(capture, static_argnames="spec")


def tiny_noise(batch: int = BATCH, text_len: int = TEXT_LEN, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed + 300)
    return jnp.asarray(rng.gumbel(size=(batch, text_len, 48)), jnp.float32)


def relative_error(tree: Any, oracle: Any) -> float:
    """The largest ‖x − oracle‖ / ‖oracle‖ over leaves; the trees must have the same structure."""

    def error(x, y) -> float:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(y) > 0, "the oracle is zero: the comparison would show nothing"
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    return max(jax.tree.leaves(jax.tree.map(error, tree, oracle)))


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def cosine(tree: Any, other: Any) -> float:
    x, y = flat(tree), flat(other)
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


# --- the oracle ---------------------------------------------------------------------------------


def plain_prompt(trainable: Params, frozen: Params, activation_BD, spec: LensSpec) -> jax.Array:
    parts = {**frozen["decoder"], **trainable["decoder"]}
    statistics, projection = frozen["statistics"], parts["projection"]
    normal_BD = (activation_BD - statistics["mean"][None]) / statistics["scale"]
    slot_BD = normal_BD @ projection["kernel"] + projection["bias"][None]
    slot_BD = as_embedding(parts.get("base", frozen["original"]), slot_BD, spec.model)
    repeat = lambda vectors: jnp.stack([vectors] * len(activation_BD))
    n_left = len(spec.decoder_left)
    left, right = parts["soft_prompt"][:n_left], parts["soft_prompt"][n_left:]
    return jnp.concatenate([repeat(left), slot_BD[:, None], repeat(right)], axis=1)


def plain_predictions(trainable: Params, frozen: Params, x_BSD, spec: LensSpec) -> jax.Array:
    """The decoder's logits at every position of an input of embeddings."""
    parts = {**frozen["decoder"], **trainable["decoder"]}
    base = parts.get("base", frozen["original"])
    positions_BS = all_positions(*x_BSD.shape[:2])
    x_BSD = add_position_embeddings(base, x_BSD, positions_BS, spec.model)
    x_BSD, _ = run_layers(base["layers"], x_BSD, positions_BS, config=spec.model)
    return transformer.head_of(base, spec.model, parts.get("output_head")).logits(x_BSD)


def plain_text(
    trainable: Params, frozen: Params, activation_BD, noise_BTV, tau, spec: LensSpec, history=1.0
) -> tuple[jax.Array, jax.Array]:
    """(logits [B, T, V], straight-through one-hot tokens [B, T, V]), one full pass a token.

    With ``history=0`` a token is a constant to the tokens behind it.
    """
    table_VD = {**frozen["decoder"], **trainable["decoder"]}.get("base", frozen["original"])
    table_VD = token_table(table_VD)
    prompt_BpD = plain_prompt(trainable, frozen, activation_BD, spec)
    text_len, last = noise_BTV.shape[1], prompt_BpD.shape[1] - 1

    def write(x_BSD, step):
        # Slots that are not written yet are zero; attention is causal and does not see them.
        logits_BV = plain_predictions(trainable, frozen, x_BSD, spec)[:, last + step]
        noisy_BV = logits_BV + noise_BTV[:, step]
        hard = jax.nn.one_hot(jnp.argmax(noisy_BV, axis=-1), noisy_BV.shape[-1])
        soft = jax.nn.softmax(noisy_BV / tau)
        slope = soft - jax.lax.stop_gradient(soft)
        seen_BD = scale_embeddings(matmul(hard + history * slope, table_VD), spec.model)
        return x_BSD.at[:, last + 1 + step].set(seen_BD), (logits_BV, hard + slope)

    x_BSD = jnp.pad(prompt_BpD, ((0, 0), (0, text_len), (0, 0)))
    _, (logits_TBV, choices_TBV) = jax.lax.scan(write, x_BSD, jnp.arange(text_len))
    return logits_TBV.swapaxes(0, 1), choices_TBV.swapaxes(0, 1)


def plain_encoder_table(trainable: Params, frozen: Params) -> jax.Array:
    return trainable["encoder"].get("base", frozen["original"])["embedding"]


def plain_reconstruction(trainable: Params, frozen: Params, text_BTD, spec: LensSpec) -> jax.Array:
    parts = {**frozen["encoder"], **trainable["encoder"]}
    base = parts.get("base", frozen["original"])
    lower = slice_layers(base["layers"], 0, spec.layer + 1)
    n_left = len(spec.encoder_left)
    repeat = lambda vectors: jnp.stack([vectors] * len(text_BTD))
    left, right = parts["soft_prompt"][:n_left], parts["soft_prompt"][n_left:]
    x_BSD = jnp.concatenate([repeat(left), text_BTD, repeat(right)], axis=1)
    positions_BS = all_positions(*x_BSD.shape[:2])
    x_BSD = add_position_embeddings(base, x_BSD, positions_BS, spec.model)
    x_BSD, _ = run_layers(lower, x_BSD, positions_BS, config=spec.model)
    mean, scale = frozen["statistics"]["mean"][None], frozen["statistics"]["scale"]
    normal_BD = (x_BSD[:, -1] - mean) / scale
    projected = normal_BD @ parts["projection"]["kernel"] + parts["projection"]["bias"][None]
    return projected * scale + mean


def plain_swap(original: Params, batch: Batch, vector_BD, spec: LensSpec) -> jax.Array:
    """M's logits everywhere, the whole context run again with the vector at P."""
    positions_BS = positions_of(batch.mask_GS)
    lower = slice_layers(original["layers"], 0, spec.layer + 1)
    upper = slice_layers(original["layers"], spec.layer + 1, spec.model.n_layers)
    x_BSD = embed_tokens(original, batch.tokens_GS, spec.model)
    x_BSD = add_position_embeddings(original, x_BSD, positions_BS, spec.model)
    x_BSD, _, beside = run_part(lower, x_BSD, positions_BS, config=spec.model)
    x_BSD = x_BSD.at[jnp.arange(len(vector_BD)), batch.positions_B].set(vector_BD)
    x_BSD, _, _ = run_part(upper, x_BSD, positions_BS, config=spec.model, beside=beside)
    return unembed(original, x_BSD, config=spec.model)
