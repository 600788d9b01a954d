"""A naive joint step, the reference for correctness and cost.

It has the same loss and the same exact gradient, without optimisations: no cache (each token is
written by a pass over the whole prefix), autodiff through everything (tokens are one-hot vectors
``hard + soft − stop_gradient(soft)``), separate passes through D and E for the other activation a',
and a swap that runs the whole context again, with logits at every position.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from conlens_jax.lens.batch import Batch
from conlens_jax.lens.decoder import decoder_head, prompt_embeddings, slot_patches
from conlens_jax.lens.encoder import encode_embeddings
from conlens_jax.lens.losses import entropy, kl_divergence, reconstruction_error
from conlens_jax.lens.objective import TERMS, Objective, reference_text, warm_loss
from conlens_jax.lens.spec import Decoder, LensSpec, decoder_of, encoder_of
from conlens_jax.models.embeddings import (
    add_position_embeddings,
    embed_tokens,
    scale_embeddings,
    token_table,
)
from conlens_jax.models.layer_kinds import slice_layers
from conlens_jax.models.param_table import Params
from conlens_jax.models.quantized import matmul
from conlens_jax.models.transformer import (
    all_positions,
    forward,
    positions_of,
    run_layers,
    run_part,
    unembed,
)


def write_text(
    decoder: Decoder,
    activation_BD: Float[Array, "B D"],
    noise_BTV: Float[Array, "B T V"],
    tau: Float[Array, ""],
    *,
    spec: LensSpec,
) -> tuple[Float[Array, "B T V"], Float[Array, "B T V"]]:
    """(logits, straight-through one-hot tokens), with one pass over the whole prefix per token."""
    table_VD = token_table(decoder.base)
    patches = slot_patches(decoder, activation_BD, spec)
    x_BsD = prompt_embeddings(decoder, activation_BD, spec)
    logits, choices = [], []
    for step in range(spec.text_len):
        positions_Bs = all_positions(*x_BsD.shape[:2])
        state, _ = run_layers(
            decoder.base["layers"],
            add_position_embeddings(decoder.base, x_BsD, positions_Bs, spec.model),
            positions_Bs,
            config=spec.model,
            patches=patches,
        )
        logits_BV = decoder_head(decoder, spec).logits(state[:, -1])
        noisy_BV = logits_BV + noise_BTV[:, step]
        hard = jax.nn.one_hot(jnp.argmax(noisy_BV, axis=-1), noisy_BV.shape[-1])
        soft = jax.nn.softmax(noisy_BV / tau)
        choice_BV = hard + soft - jax.lax.stop_gradient(soft)
        next_BD = scale_embeddings(matmul(choice_BV.astype(table_VD.dtype), table_VD), spec.model)
        x_BsD = jnp.concatenate([x_BsD, next_BD[:, None].astype(x_BsD.dtype)], axis=1)
        logits.append(logits_BV)
        choices.append(choice_BV)
    return jnp.stack(logits, axis=1), jnp.stack(choices, axis=1)


def lens_text(
    trainable: Params,
    frozen: Params,
    activation_BD: Array,
    noise_BTV: Array,
    tau: Array,
    spec: LensSpec,
) -> tuple[Array, Array]:
    """:func:`write_text` by the decoder of a lens."""
    decoder = decoder_of(trainable, frozen)
    return write_text(decoder, activation_BD, noise_BTV, tau, spec=spec)


def round_trip(
    trainable: Params,
    frozen: Params,
    activation_BD: Array,
    noise_BTV: Array,
    tau: Array,
    spec: LensSpec,
    write: Callable = lens_text,
) -> tuple[Array, Array, Array]:
    """(reconstruction, D's logits, tokens) of activations."""
    encoder = encoder_of(trainable, frozen, spec)
    logits_BTV, choice_BTV = write(trainable, frozen, activation_BD, noise_BTV, tau, spec)
    table_VD = token_table(encoder.base)
    text_BTD = scale_embeddings(matmul(choice_BTV.astype(table_VD.dtype), table_VD), spec.model)
    reconstruction_BD = encode_embeddings(encoder, text_BTD, spec=spec)
    return reconstruction_BD, logits_BTV, jnp.argmax(choice_BTV, axis=-1).astype(jnp.int32)


def contexts_of(batch: Batch) -> tuple[Array, Array]:
    """(tokens, mask) [B, S], with the context repeated for every row."""
    each = lambda array: jnp.repeat(array, batch.rows_per_document, axis=0)
    return each(batch.tokens_GS), each(batch.mask_GS)


def target_logits(original: Params, batch: Batch, *, spec: LensSpec) -> Float[Array, "B S V"]:
    """M's logits over the whole context."""
    tokens_BS, mask_BS = contexts_of(batch)
    return forward(original, tokens_BS, config=spec.model, mask_BS=mask_BS)


def swapped_logits(
    original: Params, batch: Batch, vector_BD: Float[Array, "B D"], *, spec: LensSpec
) -> Float[Array, "B S V"]:
    """M's logits over the whole context, computed again with the vector at P."""
    tokens_BS, mask_BS = contexts_of(batch)
    config, positions_BS = spec.model, positions_of(mask_BS)
    x_BSD = embed_tokens(original, tokens_BS, config)
    x_BSD = add_position_embeddings(original, x_BSD, positions_BS, config)
    lower = slice_layers(original["layers"], 0, spec.layer + 1)
    x_BSD, _, beside = run_part(lower, x_BSD, positions_BS, config=config)
    rows = jnp.arange(len(vector_BD))
    x_BSD = x_BSD.at[rows, batch.positions_B].set(vector_BD.astype(x_BSD.dtype))
    upper = slice_layers(original["layers"], spec.layer + 1, config.n_layers)
    x_BSD, _, _ = run_part(upper, x_BSD, positions_BS, config=config, beside=beside)
    return unembed(original, x_BSD, config=spec.model)


def naive_loss(
    trainable: Params,
    frozen: Params,
    batch: Batch,
    noise_BTV: Float[Array, "B T V"],
    weights: dict[str, Float[Array, ""]],
    tau: Float[Array, ""],
    *,
    objective: Objective,
    write: Callable = lens_text,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The value of ``joint_loss`` for the dual path and the straight-through estimator, including
    sampling by ``write``; its gradient through the sampled history is exact."""
    spec, original = objective.spec, frozen["original"]
    decoded = round_trip(trainable, frozen, batch.activation_BD, noise_BTV, tau, spec, write)
    reconstruction_BD, logits_BTV, text_BT = decoded
    shift = batch.rows_per_document
    other_BD = jnp.roll(batch.activation_BD, shift, axis=0)
    other_noise_BTV = jnp.roll(noise_BTV, shift, axis=0)
    guess_BD, _, _ = round_trip(trainable, frozen, other_BD, other_noise_BTV, tau, spec, write)
    delta_BD = jax.lax.stop_gradient(other_BD.astype(jnp.float32) - guess_BD)
    terms = loss_terms(
        reconstruction_BD,
        batch,
        logits_BTV,
        reference_text(frozen, batch.activation_BD, text_BT, objective).logits(),
        target_logits(original, batch, spec=spec),
        swapped_logits(original, batch, reconstruction_BD + delta_BD, spec=spec),
        frozen["statistics"],
        objective=objective,
    )
    if objective.uses("text"):
        terms["text"], _ = warm_loss(trainable, frozen, batch, objective=objective)
    used = [name for name in TERMS if name in terms and objective.uses(name)]
    total = sum(TERMS[name] * weights[name] * terms[name] for name in used)
    return jnp.asarray(total, jnp.float32), terms


def loss_terms(
    reconstruction_BD,
    batch: Batch,
    logits_BTV,
    reference_BTV,
    target_BSV,
    swapped_BSV,
    statistics: Params,
    *,
    objective: Objective,
) -> dict[str, Array]:
    """All terms; the KL at P..P+h−1 is taken from the logits of the whole context."""
    rows_B1 = jnp.arange(target_BSV.shape[0])[:, None]
    window_Bh = batch.positions_B[:, None] + jnp.arange(objective.loss.kl_horizon)[None]
    kl_Bh = kl_divergence(target_BSV[rows_B1, window_Bh], swapped_BSV[rows_B1, window_Bh])
    error_B = reconstruction_error(
        reconstruction_BD, batch.activation_BD, statistics, objective.loss.mse_kind
    )
    return {
        "kl": jnp.mean(kl_Bh),
        "mse": jnp.mean(error_B),
        "lm": jnp.mean(kl_divergence(jax.lax.stop_gradient(reference_BTV), logits_BTV)),
        "entropy": jnp.mean(entropy(logits_BTV)),
    }
