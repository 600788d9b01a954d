"""Many texts at once, as fast as a CPU allows: a pass over the prompts, then a token at a time.

:func:`conlens_jax.models.generate.generate` is the everyday call and has one program for many
lengths; its cache is one array of all layers. Here, where ``model.unroll`` is 0, every layer has
its own weights and cache, so that XLA copies neither of them for a token:

* keys are stored transposed, and scores are a plain matrix product;
* a token's key and value are written before they are read, so the cache is updated in place;
* on a CPU matrices are the left operand (:class:`~conlens_jax.models.products.TransposedMatrix`);
* the sampler does not sort (:func:`~conlens_jax.models.sampling.draw_token`).

``python scripts/benchmark_text.py`` compares the two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from conlens_jax.models.attention import attend
from conlens_jax.models.beside import apart
from conlens_jax.models.block import KeysAndValues, attention_inputs, layer_output, score_form
from conlens_jax.models.cache import KVCache, with_room, write_slots
from conlens_jax.models.families import family_of
from conlens_jax.models.layer_kinds import NO_POSITION, mask_and_rope_of
from conlens_jax.models.matrix_sizes import layer_matrix_sizes
from conlens_jax.models.param_table import Params
from conlens_jax.models.products import Products, TransposedMatrix
from conlens_jax.models.quantized import Int8Matrix
from conlens_jax.models.sampling import choose_token, draw_token
from conlens_jax.models.transformer import (
    Head,
    add_position_embeddings,
    all_positions,
    embed_tokens,
    head_of,
    positions_of,
    run_layers,
)
from conlens_jax.models.transformer_config import TransformerConfig


class LayerCaches(NamedTuple):
    """Keys and values of each layer in C slots, and each slot's position."""

    keys: tuple[Float[Array, "B K X C"], ...]
    values: tuple[Float[Array, "B K C X"], ...]
    positions_BC: Int[Array, "B C"]


class Drawing(NamedTuple):
    """How tokens are chosen: the most probable if ``temperature`` is None, else as in
    :func:`~conlens_jax.models.sampling.draw_token`, with a key per row and text position."""

    keys_B: Key[Array, "B"]
    temperature: Float[Array, ""] | None
    top_p: Float[Array, ""] | None


Rest = tuple[Int[Array, "b S"], Bool[Array, "b S"]]
"""Tokens of prompts and their mask, padded on either side; at least one token in each row."""
Start = tuple[Int[Array, "B T"], KVCache | LayerCaches]
"""The first token of each text, and the cache."""


class TextWriter:
    """A model, prepared for many calls of :meth:`write`. Where layers are unrolled it keeps each
    layer's weights a second time, as arrays of their own, on a CPU transposed."""

    def __init__(self, params: Params, config: TransformerConfig):
        self._params, self._config = params, config
        self._by_layer = params
        if not config.unroll:
            self._by_layer = {**params, "layers": _each_layer(params["layers"], config=config)}

    def write(
        self,
        prefix_P: Int[Array, " P"],
        rests: Sequence[Rest],
        drawing: Drawing,
        stop_e: Int[Array, " e"],
        *,
        length: int,
        slots: int,
    ) -> Int[Array, "B T"]:
        """Up to ``length`` tokens after each prompt; those after a token of ``stop_e`` have no
        meaning.

        Args:
          prefix_P: what all prompts begin with, such as a chat's system message: read once.
          rests: what follows in each prompt, the B rows in one or several groups, each of which is
            read at its own length S.
          slots: of the cache, at least P + S + ``length`` for the largest S. The program that
            writes is compiled for each number of slots, the one that reads a group also for each
            P, S and number of rows.
        """
        start = self._read(prefix_P, rests, drawing, length, slots)
        n_rest_B = jnp.concatenate([jnp.sum(mask, axis=1, dtype=jnp.int32) for _, mask in rests])
        first_slot = len(prefix_P) + max(tokens.shape[1] for tokens, _ in rests)
        written_BT, _ = _write_rest(
            *(self._by_layer, start, len(prefix_P) + n_rest_B, jnp.int32(first_slot), drawing),
            stop_e,
            config=self._config,
        )
        return written_BT

    def _read(self, prefix_P, rests, drawing, length: int, slots: int) -> Start:
        starts, row = [], 0
        for tokens_bS, mask_bS in rests:
            keys_B = drawing.keys_B
            keys_b = None if keys_B is None else keys_B[row : row + len(tokens_bS)]
            starts.append(
                _read_prompts(
                    *(self._params, prefix_P, tokens_bS, mask_bS, drawing._replace(keys_B=keys_b)),
                    **dict(length=length, slots=slots, config=self._config),
                )
            )
            row += len(tokens_bS)
        return starts[0] if len(starts) == 1 else _joined(starts)


@functools.partial(jax.jit, static_argnames="config")
def _each_layer(layers: Params, *, config: TransformerConfig) -> tuple[Params, ...]:
    """Each layer's weights, on a CPU with its matrices as :class:`TransposedMatrix`."""
    n_inputs = {}
    if jax.default_backend() == "cpu":
        matrices = layer_matrix_sizes(config)
        n_inputs = {
            row.path[-1]: len(row.matrix_dims[0])
            for row in family_of(config).param_table(config)
            if row.path[-1] in matrices and not row.has_experts
        }

    def one(number: int) -> Params:
        weights = jax.tree.map(lambda stacked: stacked[number], layers)
        for name, inputs in n_inputs.items():
            if not isinstance(weights[name], Int8Matrix):
                weights[name] = TransposedMatrix.of(weights[name], inputs)
        return weights

    return tuple(map(one, range(config.n_layers)))


def _choose(
    head: Head, state_BD: Float[Array, "B D"], drawing: Drawing, step: Array
) -> Int[Array, "B"]:
    logits_BV = head.logits(state_BD)
    if drawing.temperature is None:
        return choose_token(logits_BV, None, None, None)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(drawing.keys_B, step)
    return draw_token(logits_BV, keys_B, drawing.temperature, drawing.top_p)


@functools.partial(jax.jit, static_argnames=("length", "slots", "config"))
def _read_prompts(
    params: Params,
    prefix_P: Array,
    tokens_BS: Array,
    mask_BS: Array,
    drawing: Drawing,
    *,
    length: int,
    slots: int,
    config: TransformerConfig,
) -> Start:
    batch, shared = len(tokens_BS), len(prefix_P)
    positions_BS = positions_of(mask_BS)
    positions_BS = jnp.where(mask_BS, shared + positions_BS, NO_POSITION)
    # A scan compiles faster, and with so many tokens it is as fast.
    scanned = dataclasses.replace(config, unroll=config.unroll or 1)

    def read(tokens: Array, positions: Array, **cache) -> tuple[Array, KVCache]:
        x = embed_tokens(params, tokens, config)
        x = add_position_embeddings(params, x, positions, config)
        return run_layers(params["layers"], x, positions, config=scanned, **cache)

    if shared:
        _, cache = read(prefix_P[None], all_positions(1, shared), keep_cache=True)
        of_all = lambda array, axis: jnp.repeat(array, batch, axis)
        cache = KVCache(
            of_all(cache.keys, 1), of_all(cache.values, 1), of_all(cache.positions_BC, 0)
        )
        cache = with_room(cache, tokens_BS.shape[1])
        x_BSD, cache = read(tokens_BS, positions_BS, cache=cache, slot=jnp.int32(shared))
    else:
        x_BSD, cache = read(tokens_BS, positions_BS, keep_cache=True)
    cache = with_room(cache, slots - shared - tokens_BS.shape[1])
    if not config.unroll:
        transposed = jnp.swapaxes(cache.keys, -1, -2)
        cache = LayerCaches(tuple(transposed), tuple(cache.values), cache.positions_BC)
    last_B = jnp.argmax(jnp.where(positions_BS == NO_POSITION, -1, positions_BS), axis=1)
    token_B = _choose(
        head_of(params, config), x_BSD[jnp.arange(batch), last_B], drawing, jnp.int32(0)
    )
    return jnp.broadcast_to(token_B[:, None], (batch, length)), cache


@jax.jit
def _joined(starts: list[Start]) -> Start:
    """What has been read of several groups of rows, as of one."""
    has_layers = isinstance(starts[0][1], KVCache)  # before the rows
    join = lambda *arrays, axis=0: jnp.concatenate(arrays, axis)
    written_BT = join(*(written for written, _ in starts))
    if not has_layers:
        return written_BT, jax.tree.map(join, *(cache for _, cache in starts))
    keys, values, positions = zip(*(cache for _, cache in starts), strict=True)
    return written_BT, KVCache(join(*keys, axis=1), join(*values, axis=1), join(*positions))


@functools.partial(jax.jit, static_argnames="config", donate_argnums=1)
def _write_rest(
    params: Params,
    start: Start,
    n_valid_B: Int[Array, "B"],
    first_slot: Int[Array, ""],
    drawing: Drawing,
    stop_e: Int[Array, " e"],
    *,
    config: TransformerConfig,
) -> Start:
    head = head_of(params, config)

    def has_ended(token_B: Array) -> Bool[Array, "B"]:
        return jnp.any(token_B[:, None] == stop_e[None], axis=1)

    def write_next(carry):
        step, written_BT, ended_B, cache = carry
        token_B = jax.lax.dynamic_index_in_dim(written_BT, step - 1, axis=1, keepdims=False)
        positions_B1 = (n_valid_B + step - 1)[:, None]
        x_B1D = add_position_embeddings(
            params, embed_tokens(params, token_B[:, None], config), positions_B1, config
        )
        x_B1D, cache = _run(
            params["layers"], x_B1D, positions_B1, cache, first_slot + step - 1, config
        )
        token_B = _choose(head, x_B1D[:, 0], drawing, step)
        written_BT = write_slots(written_BT, token_B[:, None], step, axis=1)
        return step + 1, written_BT, ended_B | has_ended(token_B), cache

    def continues(carry) -> Bool[Array, ""]:
        step, written_BT, ended_B, _ = carry
        return (step < written_BT.shape[1]) & ~jnp.all(ended_B)

    written_BT, cache = start
    carry = (jnp.int32(1), written_BT, has_ended(written_BT[:, 0]), cache)
    _, written_BT, _, cache = jax.lax.while_loop(continues, write_next, carry)
    return written_BT, cache  # returned, so that the given one is updated in place


def _run(
    layers: Params | tuple[Params, ...],
    x_B1D: Float[Array, "B 1 D"],
    positions_B1: Int[Array, "B 1"],
    cache: KVCache | LayerCaches,
    slot: Int[Array, ""],
    config: TransformerConfig,
) -> tuple[Float[Array, "B 1 D"], KVCache | LayerCaches]:
    """One token of each row through all layers."""
    if isinstance(cache, KVCache):
        return run_layers(layers, x_B1D, positions_B1, config=config, cache=cache, slot=slot)
    mask_and_rope, index_N = mask_and_rope_of(
        slice(0, len(layers)), positions_B1, cache.positions_BC, config
    )
    itself_C = jnp.arange(cache.positions_BC.shape[1]) == slot
    x_B1D, beside = apart({}, x_B1D, config)
    own_inputs = None if beside is None else beside.inputs_NBSI
    newest: dict[bool, KeysAndValues] = {}
    keys, values = [], []
    for number, weights in enumerate(layers):
        index = jax.tree.map(lambda array, number=number: array[number], index_N)
        here, products = mask_and_rope.of(index), Products(weights)
        has_window = bool(config.windows and config.windows[number])
        earlier = newest.get(has_window) if config.shares(number) else None
        query, key, value = attention_inputs(x_B1D, products, here, index, config, earlier)
        newest[has_window] = key, value
        # Written before they are read: otherwise XLA keeps the old cache too, and copies it.
        keys.append(write_slots(cache.keys[number], jnp.swapaxes(key, -1, -2), slot, axis=3))
        values.append(write_slots(cache.values[number], value, slot, axis=2))
        attended = attend(
            query,
            (jnp.swapaxes(keys[-1], -1, -2), values[-1]),
            here.past_mask | itself_C[None, None],
            score_form(index, weights, config),
        )
        own_input = None if own_inputs is None else own_inputs[number]
        x_B1D = layer_output(x_B1D, attended, products, config, own_input)
    positions_BC = write_slots(cache.positions_BC, positions_B1, slot, axis=1)
    return x_B1D, LayerCaches(tuple(keys), tuple(values), positions_BC)
