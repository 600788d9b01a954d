"""The gradient through the decoder's own text: token t is an input of token t + 1.

The values of :func:`text_states` are those of the parallel pass over the text. Backward, each
state's cotangent also gets the part that comes through the token sampled from that state.

Token t depends only on earlier ones, so one pass over the tokens from the last to the first
is exact (``lens.history_gradient="exact"``). Cheaper or simpler: ``"sweeps"`` takes
``lens.history_sweeps`` vector-Jacobian products of the whole pass (T − 1 of them are exact too),
``"detached"`` none.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from conlens_jax.config import LensConfig
from conlens_jax.config.estimator import estimator_of
from conlens_jax.lens.decoder import (
    decoder_head,
    prompt_embeddings,
    slot_patches,
    teacher_forced_states,
)
from conlens_jax.lens.estimators import logits_cotangent
from conlens_jax.lens.gumbel import Noise, as_noise
from conlens_jax.lens.spec import Decoder, LensSpec
from conlens_jax.lens.vocabulary import chunks_of, sampled_embeddings
from conlens_jax.models.backward import TokenVjp, forward_with_residuals, layers_vjp
from conlens_jax.models.embeddings import (
    add_position_embeddings,
    embed_tokens,
    embeddings_vjp,
    scale_embeddings,
    token_table,
)
from conlens_jax.models.param_table import Params
from conlens_jax.models.quantized import JoinedTable, Matrix, matmul, take_rows_bar, zeros_bar
from conlens_jax.models.transformer import Patches, all_positions
from conlens_jax.parallel.constrain import constrain


def backward_sweeps(lens: LensConfig, text_len: int) -> int:
    """How many backward sweeps ``lens.history_gradient`` asks for.

    The backward system is strictly triangular: T − 1 sweeps solve it exactly.
    """
    if lens.history_gradient == "exact":
        return text_len - 1
    if lens.history_gradient == "detached":
        return 0
    return min(lens.history_sweeps, text_len - 1)


def text_states(
    decoder: Decoder,
    activation_BD: Float[Array, "B D"],
    tokens_BT: Int[Array, "B T"],
    noise: Noise | Float[Array, "B T V"],
    tau: Float[Array, ""],
    spec: LensSpec,
    keys_BT: Key[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """The states that the text was sampled from, with the gradient through the sampled tokens.

    Args:
      tokens_BT: what :func:`~conlens_jax.lens.decoder.generate` wrote with ``noise``.
      tau: temperature of the backward pass.
      keys_BT: for an estimator (``lens.estimator``) that draws its own noise.
    """
    return _text_states(decoder, activation_BD, tokens_BT, as_noise(noise), tau, keys_BT, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _text_states(decoder, activation_BD, tokens_BT, noise, tau, keys_BT, spec):
    del noise, tau, keys_BT
    return teacher_forced_states(decoder, activation_BD, tokens_BT, spec=spec)


def _forward(decoder, activation_BD, tokens_BT, noise, tau, keys_BT, spec):
    prompt_BpD, patches = _decoder_inputs(decoder, activation_BD, spec)
    history_BtD = embed_tokens(decoder.base, tokens_BT[:, :-1], spec.model)
    x = jnp.concatenate([prompt_BpD, history_BtD.astype(prompt_BpD.dtype)], axis=1)
    positions = all_positions(*x.shape[:2])
    x = add_position_embeddings(decoder.base, x, positions, spec.model)
    x, saved = forward_with_residuals(
        decoder.base["layers"], x, positions, config=spec.model, patches=patches
    )
    state_BTD = x[:, prompt_BpD.shape[1] - 1 :]
    inputs = (decoder, activation_BD, tokens_BT, noise, tau, keys_BT)
    return state_BTD, (inputs, saved, state_BTD)


def _backward(spec, residuals, state_bar_BTD):
    inputs, saved, state_BTD = residuals
    decoder, activation_BD, tokens_BT, noise, tau, keys_BT = inputs
    layers, table_VD = decoder.base["layers"], token_table(decoder.base)
    length = saved.inputs_BSD.shape[2]
    prompt_len = length - (spec.text_len - 1)
    positions_BS = all_positions(len(tokens_BT), length)
    estimator, head = estimator_of(spec.lens), decoder_head(decoder, spec)
    history_BtD = embed_tokens(decoder.base, tokens_BT[:, :-1], spec.model)

    def vjp_of_tokens(history_bar: Array):
        """Cotangents of (head, states) through the tokens sampled from them."""

        def embed(head, state):
            rest = (noise, tokens_BT, table_VD, tau)
            rows = sampled_embeddings(head, state, *rest, estimator=estimator, keys_BT=keys_BT)
            return scale_embeddings(rows, spec.model)

        _, pull = jax.vjp(embed, head, state_BTD)
        # The decoder does not read the last token: its embedding has no gradient.
        return pull(jnp.pad(history_bar.astype(table_VD.dtype), ((0, 0), (0, 1), (0, 0))))

    def vjp_of_pass(total_BTD: Array):
        """Cotangents of layers, input embeddings and patches."""
        patch_at = None if decoder.input_patches is None else jnp.int32(len(spec.decoder_left))
        out_bar = jnp.pad(total_BTD, ((0, 0), (prompt_len - 1, 0), (0, 0)))
        return layers_vjp(
            layers, saved, out_bar, positions_BS, config=spec.model, patch_at=patch_at
        )

    sweeps = backward_sweeps(spec.lens, spec.text_len)
    total_BTD = state_bar_BTD
    head_bar = zeros_bar(head)
    if spec.lens.history_gradient == "exact" and sweeps:
        history_bar = _history_cotangents(residuals, state_bar_BTD, positions_BS, spec)
        head_bar, through = vjp_of_tokens(history_bar)
        total_BTD = state_bar_BTD + through
    else:
        for _ in range(sweeps):
            _, x_bar, _ = vjp_of_pass(total_BTD)
            history_bar = embeddings_vjp(
                decoder.base, history_BtD, x_bar[:, prompt_len:], spec.model
            )[1]
            head_bar, through = vjp_of_tokens(history_bar)
            total_BTD = state_bar_BTD + through
    layers_bar, x_bar, patches_bar = vjp_of_pass(total_BTD)

    inputs_of = functools.partial(_decoder_inputs, spec=spec)
    (prompt_BpD, patches), pull = jax.vjp(inputs_of, decoder, activation_BD)
    if patches is not None:
        patches = Patches(patches_bar, np.zeros((), jax.dtypes.float0))
    embeddings_BSD = jnp.concatenate([prompt_BpD, history_BtD.astype(prompt_BpD.dtype)], axis=1)
    input_rows_bar, x_bar = embeddings_vjp(decoder.base, embeddings_BSD, x_bar, spec.model)
    decoder_bar, activation_bar = pull((x_bar[:, :prompt_len].astype(prompt_BpD.dtype), patches))
    history_bar = scale_embeddings(x_bar[:, prompt_len:].astype(table_VD.dtype), spec.model)
    table_bar = take_rows_bar(table_VD, tokens_BT[:, :-1], history_bar)
    base_bar = _with_table(decoder_bar.base, table_bar) | input_rows_bar
    if "position_embedding" in base_bar:
        in_order = jnp.sum(x_bar, axis=0).astype(table_VD.dtype)
        rows = slice(spec.model.position_offset, spec.model.position_offset + length)
        base_bar["position_embedding"] = base_bar["position_embedding"].at[rows].add(in_order)
    base_bar |= {"layers": layers_bar, **head_bar.rows}
    decoder_bar = decoder_bar._replace(base=base_bar, head_DV=head_bar.matrix_DV)
    return decoder_bar, activation_bar, None, None, None, None


_text_states.defvjp(_forward, _backward)


def _with_table(base_bar: Params, table_bar: Matrix | JoinedTable) -> Params:
    """The cotangents with those of the tokens' rows."""
    if not isinstance(table_bar, JoinedTable):
        return base_bar | {"embedding": table_bar}
    # The slot of the activation has used a row of the second table too.
    add = lambda one, other: one + other if jnp.issubdtype(one.dtype, jnp.inexact) else one
    first, second = table_bar.parts
    second = jax.tree.map(add, second, base_bar["layer_embedding"])
    return base_bar | {"embedding": first, "layer_embedding": second}


def _history_cotangents(residuals, state_bar_BTD: Array, positions_BS: Array, spec: LensSpec):
    """Exact cotangents [B, T−1, D] of the embeddings of all tokens but the last."""
    inputs, saved, state_BTD = residuals
    decoder, _, tokens_BT, noise, tau, keys_BT = inputs
    head, table_VD = decoder_head(decoder, spec), token_table(decoder.base)
    first = positions_BS.shape[1] - (spec.text_len - 1)
    token_vjp = TokenVjp(decoder.base["layers"], saved, positions_BS, first, spec.model)
    estimator = estimator_of(spec.lens)
    at = lambda array, index: jax.lax.dynamic_slice_in_dim(array, index, 1, axis=1)
    # One product with B T rows is much faster than T products with B rows: used where it fits.
    one_chunk = chunks_of(*tokens_BT.shape, head.vocab_size) == 1
    logits_BTV = head.logits(state_BTD) if one_chunk else None

    def visit(carry, token):
        through_B1D, later = carry
        # The state after this token is what the next one was sampled from.
        out_bar_B1D = at(state_bar_BTD, token + 1) + through_B1D
        input_bar_BD, later = token_vjp(token, out_bar_B1D[:, 0], later)
        embedding_B1D = embed_tokens(decoder.base, at(tokens_BT, token), spec.model)
        _, history_bar_B1D = embeddings_vjp(
            decoder.base, embedding_B1D, input_bar_BD[:, None], spec.model
        )
        row_bar_B1D = scale_embeddings(history_bar_B1D.astype(table_VD.dtype), spec.model)
        w = matmul(row_bar_B1D, table_VD.T)
        state_B1D = at(state_BTD, token)
        logits, pull_head = jax.vjp(head.logits, state_B1D)
        logits_bar = logits_cotangent(
            estimator,
            w,
            at(logits_BTV, token) if one_chunk else logits,
            noise.at(token).values(head.vocab_size),
            at(tokens_BT, token),
            tau,
            None if keys_BT is None else at(keys_BT, token),
        )
        # Without the barrier XLA recomputes the cotangents per column of the product with the head.
        logits_bar = jax.lax.optimization_barrier(logits_bar)
        # The products with the head and the table split D over fsdp, the layers split the batch.
        through_B1D = constrain(pull_head(logits_bar)[0], "BTD")
        return (through_B1D, later), history_bar_B1D[:, 0]

    start = jnp.zeros_like(state_bar_BTD[:, :1]), token_vjp.start()
    visits = jnp.arange(spec.text_len - 1, dtype=jnp.int32)
    _, history_bar_tBD = jax.lax.scan(visit, start, visits, reverse=True)
    return history_bar_tBD.swapaxes(0, 1)


def _decoder_inputs(
    decoder: Decoder, activation_BD: Array, spec: LensSpec
) -> tuple[Array, Patches | None]:
    prompt_BpD = prompt_embeddings(decoder, activation_BD, spec)
    return prompt_BpD, slot_patches(decoder, activation_BD, spec)
