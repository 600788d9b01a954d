"""D, the decoder: activation → text.

Sample first, differentiate second. :func:`generate` writes the text with a key-value cache and no
gradient. :func:`text_logits` then gives every logit in one parallel pass over
``[prompt, activation, text]``; its backward pass accounts for the sampled history (token t is an
input of step t + 1) by sweeps through that one pass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from conlens_jax.config.estimator import parse_estimator
from conlens_jax.lens.estimators import logits_cotangent
from conlens_jax.lens.spec import Decoder, LensSpec, around, normalise, project
from conlens_jax.models.backward import TokenPullBack, keep_layers, pull_back_layers
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer import (
    Patches,
    all_positions,
    embed_tokens,
    rms_norm,
    run_layers,
    with_room,
)


def prompt_embeddings(
    decoder: Decoder, activation_BD: Float[Array, "B D"], spec: LensSpec
) -> Float[Array, "B p D"]:
    """``left <embed> right`` with the projected activation in the slot."""
    slot_BD = project(normalise(activation_BD, decoder.statistics), decoder.projection)
    return around(decoder.prompt_pD, slot_BD[:, None], len(spec.decoder_left))


def slot_patches(
    decoder: Decoder, activation_BD: Float[Array, "B D"], spec: LensSpec
) -> Patches | None:
    """What the activation's slot receives at the inputs of layers 1, 2, …: a projection each.

    Layers without one receive zeros: a scan over all layers reads the stacked weights where they
    are, two scans over parts of them would copy them.
    """
    if decoder.input_patches is None:
        return None
    kernel, bias = decoder.input_patches["kernel"], decoder.input_patches["bias"]
    normal_BD = normalise(activation_BD, decoder.statistics).astype(kernel.dtype)
    patch_nBD = jnp.einsum("bd,nde->nbe", normal_BD, kernel) + bias[:, None]
    behind = spec.model.n_layers - 1 - len(bias)
    patch_NBD = jnp.pad(patch_nBD, ((1, behind), (0, 0), (0, 0)))
    return Patches(patch_NBD, jnp.int32(len(spec.decoder_left)))


def generate(
    decoder: Decoder,
    activation_BD: Float[Array, "B D"],
    noise_BTV: Float[Array, "B T V"] | None,
    *,
    spec: LensSpec,
) -> Int[Array, "B T"]:
    """Writes T tokens: argmax(logits + noise), or greedily where ``noise_BTV`` is None.

    Not differentiable; the gradient comes from :func:`text_logits`.
    """
    prompt_BpD = prompt_embeddings(decoder, activation_BD, spec)
    batch, prompt_len, _ = prompt_BpD.shape
    layers = decoder.base["layers"]
    x_BpD, cache = run_layers(
        layers,
        prompt_BpD,
        all_positions(batch, prompt_len),
        config=spec.model,
        keep_cache=True,
        patches=slot_patches(decoder, activation_BD, spec),
    )
    cache = with_room(cache, spec.text_len - 1)

    def choose(x_BD: Array, step: Array) -> Int[Array, "B"]:
        logits_BV = _logits(decoder, x_BD, spec)
        if noise_BTV is not None:
            logits_BV += jax.lax.dynamic_index_in_dim(noise_BTV, step, axis=1, keepdims=False)
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def write_next(carry, step):
        token_B, cache = carry
        slot = prompt_len + step - 1
        x_B1D, cache = run_layers(
            layers,
            embed_tokens(decoder.base, token_B)[:, None],
            jnp.broadcast_to(slot, (batch, 1)),
            config=spec.model,
            cache=cache,
            slot=slot,
        )
        token_B = choose(x_B1D[:, 0], step)
        return (token_B, cache), token_B

    first_B = choose(x_BpD[:, -1], jnp.int32(0))
    steps = jnp.arange(1, spec.text_len, dtype=jnp.int32)
    _, rest_TB = jax.lax.scan(write_next, (first_B, cache), steps)
    return jnp.concatenate([first_B[:, None], rest_TB.T], axis=1)


def forced_logits(
    decoder: Decoder,
    activation_BD: Float[Array, "B D"],
    history_BtD: Float[Array, "B T-1 D"],
    *,
    spec: LensSpec,
) -> Float[Array, "B T V"]:
    """Logits of all T tokens, given the embeddings of the first T − 1; one parallel pass."""
    prompt_BpD = prompt_embeddings(decoder, activation_BD, spec)
    x = jnp.concatenate([prompt_BpD, history_BtD.astype(prompt_BpD.dtype)], axis=1)
    x, _ = run_layers(
        decoder.base["layers"],
        x,
        all_positions(*x.shape[:2]),
        config=spec.model,
        patches=slot_patches(decoder, activation_BD, spec),
    )
    return _logits(decoder, x[:, prompt_BpD.shape[1] - 1 :], spec)


def teacher_forced_logits(
    decoder: Decoder,
    activation_BD: Float[Array, "B D"],
    tokens_BT: Int[Array, "B T"],
    *,
    spec: LensSpec,
) -> Float[Array, "B T V"]:
    """Logits of given text, with its plain gradient (the text is a constant)."""
    history_BtD = embed_tokens(decoder.base, tokens_BT[:, :-1])
    return forced_logits(decoder, activation_BD, history_BtD, spec=spec)


def history_sweeps(history_gradient: str, text_len: int) -> int:
    """How many backward sweeps a setting of ``lens.history_gradient`` asks for.

    Token t depends on the tokens before it only, so the backward system is strictly triangular
    and T − 1 sweeps solve it exactly.
    """
    if history_gradient == "exact":
        return text_len - 1
    if history_gradient == "detached":
        return 0
    return min(int(history_gradient.removeprefix("sweeps=")), text_len - 1)


def text_logits(
    decoder: Decoder,
    activation_BD: Float[Array, "B D"],
    tokens_BT: Int[Array, "B T"],
    noise_BTV: Float[Array, "B T V"],
    tau: Float[Array, ""],
    spec: LensSpec,
    keys_BT: Key[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Logits of D's own text, with the gradient through its sampled history.

    The values are those of :func:`teacher_forced_logits`. Backward, the cotangent of the logits is
    completed by what reaches them through the tokens that were sampled from them: each sweep is
    one vector-Jacobian product of the parallel pass with respect to its input embeddings, and
    the weights are visited once, at the end.

    Args:
      tokens_BT: what :func:`generate` wrote with ``noise_BTV``.
      tau: temperature of the backward pass.
      keys_BT: for an estimator (``lens.estimator``) that draws noise of its own.
    """
    return _text_logits(decoder, activation_BD, tokens_BT, noise_BTV, tau, keys_BT, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _text_logits(decoder, activation_BD, tokens_BT, noise_BTV, tau, keys_BT, spec):
    del noise_BTV, tau, keys_BT
    return teacher_forced_logits(decoder, activation_BD, tokens_BT, spec=spec)


def _text_logits_forward(decoder, activation_BD, tokens_BT, noise_BTV, tau, keys_BT, spec):
    prompt_BpD, patches = _read_activation(decoder, activation_BD, spec)
    history_BtD = embed_tokens(decoder.base, tokens_BT[:, :-1]).astype(prompt_BpD.dtype)
    x = jnp.concatenate([prompt_BpD, history_BtD], axis=1)
    x, kept = keep_layers(
        decoder.base["layers"],
        x,
        all_positions(*x.shape[:2]),
        config=spec.model,
        patches=patches,
    )
    out_BTD = x[:, prompt_BpD.shape[1] - 1 :]
    logits_BTV = _logits(decoder, out_BTD, spec)
    inputs = (decoder, activation_BD, tokens_BT, noise_BTV, tau, keys_BT)
    return logits_BTV, (inputs, kept, out_BTD, logits_BTV)


def _text_logits_backward(spec, residuals, cotangent_BTV):
    inputs, kept, out_BTD, logits_BTV = residuals
    decoder, activation_BD, tokens_BT, noise_BTV, tau, keys_BT = inputs
    layers, table_VD = decoder.base["layers"], decoder.base["embedding"]
    length = kept.inputs_BSD.shape[2]
    prompt_len = length - (spec.text_len - 1)
    positions_BS = all_positions(len(tokens_BT), length)
    estimator = parse_estimator(spec.lens.estimator)

    def through_tokens(history_bar: Array, window: slice | Array) -> Array:
        """From cotangents of the tokens' embeddings to those of what they were sampled from."""
        pick = lambda array: array if array is None else array[:, window]
        wanted = jnp.matmul(history_bar.astype(table_VD.dtype), table_VD.T)
        drawn = map(pick, (logits_BTV, noise_BTV, tokens_BT))
        return logits_cotangent(estimator, wanted, *drawn, tau, pick(keys_BT))

    def pull_back(total_BTV: Array) -> tuple[Any, Params, Array, Array | None]:
        """Cotangents of (norm, head, last states), layers, input embeddings, patches."""
        run = lambda norm, head, out: _head_logits(norm, head, out, spec)
        _, pull = jax.vjp(run, decoder.base["final_norm"], decoder.head_DV, out_BTD)
        head_bars = pull(total_BTV)
        patch_at = None if decoder.input_patches is None else jnp.int32(len(spec.decoder_left))
        before = ((0, 0), (prompt_len - 1, 0), (0, 0))
        out_bar = jnp.pad(head_bars[2], before)
        return head_bars, *pull_back_layers(
            layers, kept, out_bar, positions_BS, config=spec.model, patch_at=patch_at
        )

    def exact_total() -> Array:
        """Token by token from the last to the first."""
        tokens = TokenPullBack(layers, kept, positions_BS, prompt_len, spec.model)

        def visit(carry, token):
            sampled_bar_BV, later = carry
            # This token's output is what the next one was sampled from.
            at = lambda array: jax.lax.dynamic_index_in_dim(array, token + 1, 1, keepdims=False)
            run = lambda out: _logits(decoder, out, spec)
            _, pull = jax.vjp(run, at(out_BTD))
            (out_bar_BD,) = pull(at(cotangent_BTV) + sampled_bar_BV)
            history_bar_BD, later = tokens(token, out_bar_BD, later)
            sampled_bar_BV = through_tokens(history_bar_BD[:, None], token[None])[:, 0]
            return (sampled_bar_BV, later), sampled_bar_BV

        start = jnp.zeros_like(cotangent_BTV[:, 0]), tokens.start()
        visits = jnp.arange(spec.text_len - 1, dtype=jnp.int32)
        _, sampled_bar_tBV = jax.lax.scan(visit, start, visits, reverse=True)
        return cotangent_BTV + _before_last(sampled_bar_tBV.swapaxes(0, 1))

    total_BTV = cotangent_BTV
    if spec.lens.history_gradient == "exact" and spec.text_len > 1:
        total_BTV = exact_total()
    else:
        for _ in range(history_sweeps(spec.lens.history_gradient, spec.text_len)):
            _, _, x_bar, _ = pull_back(total_BTV)
            sampled_bar = through_tokens(x_bar[:, prompt_len:], slice(-1))
            total_BTV = cotangent_BTV + _before_last(sampled_bar)
    (norm_bar, head_bar, _), layers_bar, x_bar, patches_bar = pull_back(total_BTV)

    reading = functools.partial(_read_activation, spec=spec)
    (prompt_BpD, patches), pull = jax.vjp(reading, decoder, activation_BD)
    if patches is not None:
        patches = patches._replace(vectors=patches_bar, at=np.zeros((), jax.dtypes.float0))
    decoder_bar, activation_bar = pull((x_bar[:, :prompt_len].astype(prompt_BpD.dtype), patches))
    history_bar = x_bar[:, prompt_len:].astype(table_VD.dtype)
    base_bar: Params = dict(decoder_bar.base)
    base_bar["embedding"] = jnp.zeros_like(table_VD).at[tokens_BT[:, :-1]].add(history_bar)
    base_bar |= {"layers": layers_bar, "final_norm": norm_bar}
    decoder_bar = decoder_bar._replace(base=base_bar, head_DV=head_bar)
    return decoder_bar, activation_bar, None, None, None, None


_text_logits.defvjp(_text_logits_forward, _text_logits_backward)


def _before_last(bar_BtV: Float[Array, "B T-1 V"]) -> Float[Array, "B T V"]:
    """The last token is no input of D: nothing comes back through it."""
    return jnp.pad(bar_BtV, ((0, 0), (0, 1), (0, 0)))


def _read_activation(
    decoder: Decoder, activation_BD: Array, spec: LensSpec
) -> tuple[Array, Patches | None]:
    prompt_BpD = prompt_embeddings(decoder, activation_BD, spec)
    return prompt_BpD, slot_patches(decoder, activation_BD, spec)


def _logits(decoder: Decoder, x: Float[Array, "*B D"], spec: LensSpec) -> Float[Array, "*B V"]:
    return _head_logits(decoder.base["final_norm"], decoder.head_DV, x, spec)


def _head_logits(norm_D: Array, head_DV: Array, x: Array, spec: LensSpec) -> Array:
    normed = rms_norm(x, norm_D, spec.model.norm_eps)
    return jnp.matmul(normed, head_DV).astype(jnp.float32)
