"""Generation: one pass over the prompt, then one token at a time with a key-value cache.

The program is compiled for a bucket of prompt lengths and of numbers of new tokens (powers of two),
and reused for every call in that bucket; temperature and nucleus are arguments. Which keys a token
sees follows from positions alone, so a prompt may be padded on either side.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from conlens_jax.models.cache import with_room
from conlens_jax.models.layer_kinds import NO_POSITION
from conlens_jax.models.param_table import Params
from conlens_jax.models.sampling import choose_token
from conlens_jax.models.swapping import Swap, run_with_swap
from conlens_jax.models.transformer import (
    add_position_embeddings,
    embed_tokens,
    head_of,
    positions_of,
    run_layers,
)
from conlens_jax.models.transformer_config import TransformerConfig

_SMALLEST_BUCKET = 16


def bucket(length: int) -> int:
    """The smallest power of two that is at least ``length`` (and at least 16)."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("slots", "config"))
def generate(
    params: Params,
    tokens_BS: Int[Array, "B S"],
    mask_BS: Bool[Array, "B S"],
    n_new: Int[Array, ""],
    key: Key[Array, ""] | None,
    temperature: Array,
    top_p: Array | None,
    stop_e: Int[Array, " e"],
    swap: Swap | None = None,
    *,
    slots: int,
    config: TransformerConfig,
) -> Int[Array, "B slots"]:
    """Generates up to ``n_new`` tokens after each row; stops early when all rows have ended.

    Args:
      tokens_BS, mask_BS: prompts; the mask is False on padding, and True at least once per row.
      n_new: at most ``slots``.
      key: for sampling; None takes the most probable tokens.
      temperature, top_p: see :func:`~conlens_jax.models.sampling.choose_token`.
      stop_e: tokens that end a row; may be empty.
      swap: in the pass over the prompts.
      slots: room for new tokens.

    Returns:
      The new tokens. After a stop token a row repeats it; tokens after ``n_new`` are undefined.
    """
    batch, length = tokens_BS.shape
    head, layers = head_of(params, config), params["layers"]
    positions_BS = positions_of(mask_BS)
    x_BSD = embed_tokens(params, tokens_BS, config)
    x_BSD = add_position_embeddings(params, x_BSD, positions_BS, config)
    x_BSD, cache = run_with_swap(layers, x_BSD, positions_BS, swap, config=config, keep_cache=True)
    cache = with_room(cache, slots)
    n_valid_B = jnp.sum(mask_BS, axis=1, dtype=jnp.int32)
    last_B = jnp.argmax(jnp.where(positions_BS == NO_POSITION, -1, positions_BS), axis=1)
    rows_B = jnp.arange(batch)

    def choose(x_BD: Array, step: Array) -> Int[Array, "B"]:
        keys_B = None
        if key is not None:
            draw = jax.random.fold_in(key, step)
            keys_B = jax.vmap(functools.partial(jax.random.fold_in, draw))(rows_B)
        return choose_token(head.logits(x_BD), keys_B, temperature, top_p)

    def is_stop(token_B: Array) -> Bool[Array, "B"]:
        return jnp.any(token_B[:, None] == stop_e[None], axis=1)

    def continues(carry) -> Bool[Array, ""]:
        step, _, _, ended_B, _ = carry
        return (step < n_new) & ~jnp.all(ended_B)

    def write_next(carry):
        step, written_BT, token_B, ended_B, cache = carry
        positions_B1 = (n_valid_B + step - 1)[:, None]
        x_B1D, cache = run_layers(
            layers,
            add_position_embeddings(
                params, embed_tokens(params, token_B[:, None], config), positions_B1, config
            ),
            positions_B1,
            config=config,
            cache=cache,
            slot=length + step - 1,
        )
        token_B = jnp.where(ended_B, token_B, choose(x_B1D[:, 0], step))
        # All slots from here on, so that an ended row repeats its stop token to the end.
        written_BT = jnp.where(jnp.arange(slots) >= step, token_B[:, None], written_BT)
        return step + 1, written_BT, token_B, ended_B | is_stop(token_B), cache

    first_B = choose(x_BSD[rows_B, last_B], jnp.int32(0))
    written_BT = jnp.broadcast_to(first_B[:, None], (batch, slots))
    start = (jnp.int32(1), written_BT, first_B, is_stop(first_B), cache)
    return jax.lax.while_loop(continues, write_next, start)[1]
