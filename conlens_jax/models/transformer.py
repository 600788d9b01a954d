"""The transformer: one block in Flax linen, scanned over stacked parameters.

Everything here is a pure function of its arguments. The key-value cache is an argument and a
return value. Which key a query may see follows from positions alone: the key's position must not
be behind the query's, and unused slots carry :data:`NO_POSITION`.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from conlens_jax.models import rope
from conlens_jax.models.adapters import LORA_IN, LORA_OUT, low_rank
from conlens_jax.models.families import family_of
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer_config import ACTIVATIONS, TransformerConfig, array_dtype

NO_POSITION = jnp.iinfo(jnp.int32).max


class KVCache(NamedTuple):
    """Keys (already rotated) and values of n layers in C slots, and each slot's position."""

    keys: Float[Array, "n B C K X"]
    values: Float[Array, "n B C K X"]
    positions_BC: Int[Array, "B C"]


class Patches(NamedTuple):
    """Vectors to add to the residual stream at the input of each of n layers, at one place."""

    vectors: Float[Array, "n B D"]
    at: Int[Array, ""]


def empty_cache(config: TransformerConfig, n_layers: int, batch: int, slots: int) -> KVCache:
    shape = (n_layers, batch, slots, config.n_kv_heads, config.head_dim)
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
    def __call__(self, x_BSD, past, patch_BD, rotation, mask_BSC, slot, patch_at):
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
        attended, present = self._attention(weights, x_BSD, past, rotation, mask_BSC, slot)
        x_BSD = x_BSD + attended
        x_BSD = x_BSD + self._mlp(weights, x_BSD)
        return x_BSD, present

    def _attention(self, weights, x_BSD, past, rotation, mask_BSC, slot):
        x_BSD = rms_norm(x_BSD, weights["attention_norm"], self.config.norm_eps)
        query = _project("bsd,dhx->bshx", x_BSD, weights, "query")
        key = _project("bsd,dkx->bskx", x_BSD, weights, "key")
        value = _project("bsd,dkx->bskx", x_BSD, weights, "value")
        query, key = rope.rotate(query, rotation), rope.rotate(key, rotation)
        if past is not None:
            key, value = write_slots(past[0], key, slot), write_slots(past[1], value, slot)
        # JAX's attention itself mixes bf16 and fp32, which strict dtype promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            attended = jax.nn.dot_product_attention(query, key, value, mask=mask_BSC[:, None])
        return _project("bshx,hxd->bsd", attended, weights, "attention_out"), (key, value)

    def _mlp(self, weights, x_BSD):
        x_BSD = rms_norm(x_BSD, weights["mlp_norm"], self.config.norm_eps)
        activation = ACTIVATIONS[self.config.activation]
        hidden = activation(_project("bsd,df->bsf", x_BSD, weights, "gate"))
        hidden = hidden * _project("bsd,df->bsf", x_BSD, weights, "up")
        return _project("bsf,fd->bsd", hidden, weights, "down")


def _project(equation: str, x: Array, weights: Params, name: str) -> Array:
    out = jnp.einsum(equation, x, weights[name])
    if name + LORA_IN in weights:
        out += low_rank(equation, x, weights[name + LORA_IN], weights[name + LORA_OUT])
    bias = weights.get(name + "_bias")
    return out if bias is None else out + bias


def write_slots(
    past: Array, new: Array, slot: Int[Array, ""] | Int[Array, " B"]
) -> Float[Array, "B C ..."]:
    """Writes ``new`` [B, s, …] into ``past`` [B, C, …] from ``slot`` on (one for all rows, or
    one a row). A start too close to the end is moved back, as in ``dynamic_update_slice``."""
    if slot.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(past, new.astype(past.dtype), slot, axis=1)
    write = lambda row, piece, start: jax.lax.dynamic_update_slice_in_dim(row, piece, start, 0)
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
      cache: keys and values of tokens already seen; the new ones are written into it.
      slot: where the new tokens begin in the cache.
      keep_cache: return the new keys and values where no cache was given.
      patches: what is added to the residual stream at the input of each layer.

    Returns:
      The residual stream at the output of the last layer, and the cache (None if not kept).
    """
    n_layers = jax.tree.leaves(layers)[0].shape[0]
    if n_layers == 0:
        return x_BSD, cache
    if cache is None:
        past, key_positions = None, positions_BS
    else:
        past = (cache.keys, cache.values)
        key_positions = write_slots(cache.positions_BC, positions_BS, slot)
    mask_BSC: Bool[Array, "B S C"] = key_positions[:, None, :] <= positions_BS[:, :, None]
    rotation = rope.rotations(_rope_positions(positions_BS), config.rope, config.head_dim)
    keep = keep_cache or cache is not None
    block = nn.remat(Block, prevent_cse=False) if config.remat == "full" else Block
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, *(nn.broadcast,) * 4),
        length=n_layers,
        unroll=config.unroll or n_layers,
    )(config)
    patch_NBD, patch_at = (None, None) if patches is None else patches
    x_BSD, present = scanned.apply(
        {"params": layers}, x_BSD, past, patch_NBD, rotation, mask_BSC, slot, patch_at
    )
    return x_BSD, KVCache(*present, key_positions) if keep else None


def _rope_positions(positions_BS: Array) -> Array:
    return jnp.where(positions_BS == NO_POSITION, 0, positions_BS)


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


def unembed(
    params: Params, x: Float[Array, "*B D"], *, config: TransformerConfig
) -> Float[Array, "*B V"]:
    """Final norm and output head; logits in fp32."""
    normed = rms_norm(x, params["final_norm"], config.norm_eps)
    return jnp.matmul(normed, output_head(params)).astype(jnp.float32)


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
