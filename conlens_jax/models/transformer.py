"""The transformer: one block in Flax linen, scanned over stacked parameters.

Everything here is a pure function of its arguments. The key-value cache is an argument and a
return value. Which key a query may see follows from positions alone: the key's position must not
be behind the query's, and unused slots carry :data:`NO_POSITION`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.models import rope
from conlens_jax.models.adapters import LORA_IN, LORA_OUT
from conlens_jax.models.attention import attend, heads_first, key_heads_first
from conlens_jax.models.families import family_of
from conlens_jax.models.param_table import Params
from conlens_jax.models.products import Products
from conlens_jax.models.transformer_config import ACTIVATIONS, TransformerConfig, array_dtype

NO_POSITION = jnp.iinfo(jnp.int32).max


class KVCache(NamedTuple):
    """Keys (already rotated) and values of n layers in C slots, and each slot's position."""

    keys: Float[Array, "n B K C X"]
    values: Float[Array, "n B K C X"]
    positions_BC: Int[Array, "B C"]


class Patches(NamedTuple):
    """Vectors to add to the residual stream at the input of each of n layers, at one place."""

    vectors: Float[Array, "n B D"]
    at: Int[Array, ""]


class Kept(NamedTuple):
    """What a layer made on its way from input to output; stacked over n layers, ``n`` in front.

    Attributes:
      inputs_BSD: the residual stream at its input (with its patch).
      products: the result of every matrix product, by the matrix's name.
      keys: rotated.
    """

    inputs_BSD: Float[Array, "*n B S D"]
    products: dict[str, Array]
    keys: Float[Array, "*n B K S X"]
    values: Float[Array, "*n B K S X"]


# What ``model.remat`` keeps of a layer for its backward pass; "none" keeps everything.
REMAT_POLICIES = {
    "full": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def empty_cache(config: TransformerConfig, n_layers: int, batch: int, slots: int) -> KVCache:
    shape = (n_layers, batch, config.n_kv_heads, slots, config.head_dim)
    zeros = jnp.zeros(shape, array_dtype(config))
    return KVCache(zeros, zeros, jnp.full((batch, slots), NO_POSITION, jnp.int32))


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · weight; the mean in fp32 (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight


class Block(nn.Module):
    """Pre-norm attention and gated MLP. Its parameters are the ``layers`` rows of the table, and
    the adapters of these where there are any."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BSD, past, patch_BD, known, rotation, mask_BSS, past_mask_BSC, patch_at):
        """Returns the output, and what the layer made on its way (:class:`Kept`)."""
        config = self.config
        weights = {
            row.path[-1]: self.param(row.path[-1], row.initial, config, row.layer_shape(config))
            for row in family_of(config).param_table(config)
            if row.stacked
        }
        for name in [name + end for name in weights for end in (LORA_IN, LORA_OUT)]:
            if self.has_variable("params", name):
                weights[name] = self.get_variable("params", name)
        if patch_BD is not None:
            x_BSD = x_BSD.at[:, patch_at].add(patch_BD.astype(x_BSD.dtype))
        products = Products(weights, known)
        query, key, value = attention_inputs(x_BSD, products, rotation, config)
        attended = attend(query, (key, value), mask_BSS, past, past_mask_BSC)
        out_BSD = layer_output(x_BSD, attended, products, config)
        return out_BSD, Kept(x_BSD, products.made, key, value)


def attention_inputs(
    x_BSD: Float[Array, "B S D"],
    products: Products,
    rotation: tuple[Array, Array],
    config: TransformerConfig,
) -> tuple[Float[Array, "B K G S X"], Float[Array, "B K S X"], Float[Array, "B K S X"]]:
    """Rotated queries and keys, and values; each token's from that token alone."""
    x_BSD = rms_norm(x_BSD, products.weights["attention_norm"], config.norm_eps)
    query = products("bsd,dhx->bshx", x_BSD, "query")
    key = products("bsd,dkx->bskx", x_BSD, "key")
    value = products("bsd,dkx->bskx", x_BSD, "value")
    query = heads_first(rope.rotate(query, rotation), config.n_kv_heads)
    return query, key_heads_first(rope.rotate(key, rotation)), key_heads_first(value)


def layer_output(
    x_BSD: Float[Array, "B S D"],
    attended_BSHX: Float[Array, "B S H X"],
    products: Products,
    config: TransformerConfig,
) -> Float[Array, "B S D"]:
    """What follows attention; each token's from that token alone."""
    x_BSD = x_BSD + products("bshx,hxd->bsd", attended_BSHX, "attention_out")
    normed_BSD = rms_norm(x_BSD, products.weights["mlp_norm"], config.norm_eps)
    hidden = ACTIVATIONS[config.activation](products("bsd,df->bsf", normed_BSD, "gate"))
    hidden = hidden * products("bsd,df->bsf", normed_BSD, "up")
    return x_BSD + products("bsf,fd->bsd", hidden, "down")


def write_slots(
    past: Array, new: Array, slot: Int[Array, ""] | Int[Array, " B"], axis: int
) -> Float[Array, "B ..."]:
    """Writes ``new`` into ``past`` from ``slot`` of ``axis`` on (one for all rows, or one a row).
    A start too close to the end is moved back, as in ``dynamic_update_slice``."""
    update = jax.lax.dynamic_update_slice_in_dim
    if slot.ndim == 0:
        return update(past, new.astype(past.dtype), slot, axis)
    write = lambda row, piece, start: update(row, piece, start, axis - 1)
    return jax.vmap(write)(past, new.astype(past.dtype), slot)


def run_layers(
    layers: Params,
    x_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    *,
    config: TransformerConfig,
    cache: KVCache | None = None,
    slot: Int[Array, ""] | Int[Array, " B"] | None = None,
    keep_cache: bool = False,
    patches: Patches | None = None,
) -> tuple[Float[Array, "B S D"], KVCache | None]:
    """Runs the residual stream through a stack of layers.

    Args:
      layers: stacked parameters of the n layers to run (a slice of the model's).
      x_BSD: residual stream at the input of the first of them.
      positions_BS: position of each token; :data:`NO_POSITION` for padding.
      cache: keys and values of tokens already seen. The new tokens see those at positions before
        the first of their own; what the cache holds from there on is hidden from them.
      slot: where in the cache the new tokens' keys and values are written.
      keep_cache: return the new keys and values where no cache was given.
      patches: what is added to the residual stream at the input of each layer.

    Returns:
      The residual stream at the output of the last layer, and the cache (None if not kept; as it
      was, if no slot was given).
    """
    if jax.tree.leaves(layers)[0].shape[0] == 0:
        return x_BSD, cache
    x_BSD, kept = scan_layers(layers, x_BSD, positions_BS, config, cache, patches)
    if cache is not None and slot is not None:
        return x_BSD, _append(cache, kept.keys, kept.values, positions_BS, slot)
    return x_BSD, KVCache(kept.keys, kept.values, positions_BS) if keep_cache else cache


def scan_layers(
    layers: Params,
    x_BSD: Float[Array, "B S D"],
    positions_BS: Int[Array, "B S"],
    config: TransformerConfig,
    cache: KVCache | None = None,
    patches: Patches | None = None,
) -> tuple[Float[Array, "B S D"], Kept]:
    n_layers = jax.tree.leaves(layers)[0].shape[0]
    past = None if cache is None else (cache.keys, cache.values)
    patch_NBD, patch_at = (None, None) if patches is None else patches
    block = Block
    if config.remat in REMAT_POLICIES:
        block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[config.remat])
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, 0, *(nn.broadcast,) * 4),
        length=n_layers,
        unroll=config.unroll or n_layers,
    )(config)
    masks = _masks(positions_BS, cache)
    rotation = rotations_at(positions_BS, config)
    return scanned.apply(
        {"params": layers}, x_BSD, past, patch_NBD, None, rotation, *masks, patch_at
    )


def seen_keys(positions_BS: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Which tokens (last axis) each token sees."""
    return positions_BS[:, None, :] <= positions_BS[:, :, None]


def _masks(positions_BS: Array, cache: KVCache | None) -> tuple[Array, Array | None]:
    """Which new and which cached keys each new token sees."""
    new_BSS = seen_keys(positions_BS)
    if cache is None:
        return new_BSS, None
    earlier_BC = cache.positions_BC < jnp.min(positions_BS, axis=1, keepdims=True)
    shape = (*positions_BS.shape, earlier_BC.shape[1])
    return new_BSS, jnp.broadcast_to(earlier_BC[:, None], shape)


def with_room(cache: KVCache, slots: int) -> KVCache:
    """The cache with so many empty slots behind what it holds."""
    room = lambda array: jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, slots), (0, 0)))
    positions_BC = jnp.pad(cache.positions_BC, ((0, 0), (0, slots)), constant_values=NO_POSITION)
    return KVCache(room(cache.keys), room(cache.values), positions_BC)


def _append(
    cache: KVCache, keys: Array, values: Array, positions_BS: Array, slot: Array
) -> KVCache:
    # All layers at once, behind the scan: so the cache is changed in place, not copied a layer.
    write = jax.vmap(functools.partial(write_slots, axis=2), in_axes=(0, 0, None))
    return KVCache(
        write(cache.keys, keys, slot),
        write(cache.values, values, slot),
        write_slots(cache.positions_BC, positions_BS, slot, axis=1),
    )


def rotations_at(positions_BS: Int[Array, "B S"], config: TransformerConfig):
    """cos and sin of the tokens' angles; padding has the angle of position 0."""
    valid = jnp.where(positions_BS == NO_POSITION, 0, positions_BS)
    return rope.rotations(valid, config.rope, config.head_dim)


def positions_of(mask_BS: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Positions 0, 1, … of the valid tokens of each row, wherever the padding is."""
    counted = jnp.cumsum(mask_BS, axis=-1, dtype=jnp.int32) - 1
    return jnp.where(mask_BS, counted, NO_POSITION)


def all_positions(batch: int, length: int) -> Int[Array, "B S"]:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def slice_layers(layers: Params, start: int, stop: int) -> Params:
    return jax.tree.map(lambda leaf: leaf[start:stop], layers)


def embed_tokens(params: Params, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    return jnp.take(params["embedding"], tokens, axis=0)


def output_head(params: Params) -> Float[Array, "D V"]:
    """The matrix from the normed residual stream to logits; the embedding's where tied."""
    head = params.get("output_head")
    return params["embedding"].T if head is None else head


@flax.struct.dataclass
class Head:
    """From the state behind the last layer to logits: norm (with its ε) and matrix."""

    norm_D: Float[Array, " D"]
    matrix_DV: Float[Array, "D V"]
    eps: float = flax.struct.field(pytree_node=False)

    @property
    def vocab_size(self) -> int:
        return self.matrix_DV.shape[1]

    def logits(self, state: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """fp32."""
        normed = rms_norm(state, self.norm_D, self.eps)
        return jnp.matmul(normed, self.matrix_DV).astype(jnp.float32)


def head_of(params: Params, config: TransformerConfig) -> Head:
    return Head(params["final_norm"], output_head(params), config.norm_eps)


def unembed(
    params: Params, x: Float[Array, "*B D"], *, config: TransformerConfig
) -> Float[Array, "*B V"]:
    """Final norm and output head; logits in fp32."""
    return head_of(params, config).logits(x)


def forward(
    params: Params,
    tokens_BS: Int[Array, "B S"],
    *,
    config: TransformerConfig,
    mask_BS: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B S V"]:
    """Logits of whole sequences: the plain path that everything faster is tested against."""
    if mask_BS is None:
        positions_BS = all_positions(*tokens_BS.shape)
    else:
        positions_BS = positions_of(mask_BS)
    x_BSD = embed_tokens(params, tokens_BS)
    x_BSD, _ = run_layers(params["layers"], x_BSD, positions_BS, config=config)
    return unembed(params, x_BSD, config=config)
