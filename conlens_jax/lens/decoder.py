"""D, the decoder: activation → text.

Sample first, differentiate second. :func:`generate` writes the text with a key-value cache and no
gradient. :func:`text_logits` then gives every logit in one parallel pass over
``[prompt, activation, text]``; its backward pass accounts for the sampled history (token t is an
input of step t + 1) by sweeps through that one pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from conlens_jax.config.estimator import parse_estimator
from conlens_jax.lens.gumbel import straight_through_embed
from conlens_jax.lens.spec import Decoder, LensSpec, around, normalise, project
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer import (
    Patches,
    all_positions,
    embed_tokens,
    empty_cache,
    rms_norm,
    run_layers,
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
    n_layers = jax.tree.leaves(layers)[0].shape[0]
    cache = empty_cache(spec.model, n_layers, batch, prompt_len + spec.text_len - 1)
    x_BpD, cache = run_layers(
        layers,
        prompt_BpD,
        all_positions(batch, prompt_len),
        config=spec.model,
        cache=cache,
        slot=jnp.int32(0),
        patches=slot_patches(decoder, activation_BD, spec),
    )

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
    history_BtD = embed_tokens(decoder.base, tokens_BT[:, :-1])
    run = functools.partial(forced_logits, spec=spec)
    logits_BTV, pull_back = jax.vjp(run, decoder, activation_BD, history_BtD)
    table_VD = decoder.base["embedding"]
    return logits_BTV, (pull_back, logits_BTV, tokens_BT, noise_BTV, tau, keys_BT, table_VD)


def _text_logits_backward(spec, residuals, cotangent_BTV):
    pull_back, logits_BTV, tokens_BT, noise_BTV, tau, keys_BT, table_VD = residuals
    estimator = parse_estimator(spec.lens.estimator)
    keys_Bt = None if keys_BT is None else keys_BT[:, :-1]

    def through_tokens(history_bar_BtD: Array) -> tuple[Array, Array]:
        """Cotangents of logits 1..T−1 and of the embedding table, from those of the history."""
        lookup = lambda logits, table: straight_through_embed(
            logits,
            noise_BTV[:, :-1],
            tokens_BT[:, :-1],
            table,
            tau,
            estimator=estimator,
            keys=keys_Bt,
        )
        _, pull = jax.vjp(lookup, logits_BTV[:, :-1], table_VD)
        return pull(history_bar_BtD.astype(table_VD.dtype))

    total_BTV = cotangent_BTV
    for _ in range(history_sweeps(spec.lens.history_gradient, spec.text_len)):
        _, _, history_bar = pull_back(total_BTV)
        logits_bar, _ = through_tokens(history_bar)
        total_BTV = cotangent_BTV + jnp.pad(logits_bar, ((0, 0), (0, 1), (0, 0)))
    decoder_bar, activation_bar, history_bar = pull_back(total_BTV)
    _, table_bar = through_tokens(history_bar)
    base_bar: Params = dict(decoder_bar.base)
    base_bar["embedding"] = base_bar["embedding"] + table_bar
    return decoder_bar._replace(base=base_bar), activation_bar, None, None, None, None


_text_logits.defvjp(_text_logits_forward, _text_logits_backward)


def _logits(decoder: Decoder, x: Float[Array, "*B D"], spec: LensSpec) -> Float[Array, "*B V"]:
    normed = rms_norm(x, decoder.base["final_norm"], spec.model.norm_eps)
    return jnp.matmul(normed, decoder.head_DV).astype(jnp.float32)
