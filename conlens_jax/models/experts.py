"""Products of tokens with the matrices of the experts that the router has chosen for them.

A pair is a token and one of its k experts. :func:`form_of` chooses one of three forms of the same
function; in each of them every pair is computed, however uneven the router's choice is.

* ``blocks``: pairs sorted by expert, in blocks of one expert's, and a loop over the blocks that are
  not empty (the blocks of MegaBlocks, Gale et al. 2022, arXiv:2211.15841). The work is that of the
  chosen experts and less than one block more for each; experts without a token are not read.
* ``ragged``: ``jax.lax.ragged_dot`` of the sorted pairs, an instruction of TPUs. On CPUs, and on
  GPUs by default, XLA replaces it by the product of every pair with every expert under a mask.
* ``dense``: every expert for every token, most of them with weight zero
  (:func:`conlens_jax.models.mlp.mix_experts`).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from conlens_jax.models.quantized import Matrix
from conlens_jax.models.transformer_config import TransformerConfig
from conlens_jax.parallel.mesh import AXES_OF_DIM, BATCH_AXES, target_platform

PRODUCT_NAME = "expert_product"
"""The name under which ``jax.checkpoint`` knows these products."""
_FORMS = {"cpu": "blocks", "tpu": "ragged"}
# Of a block: fewer rows read an expert's matrix more often, more rows are more often empty.
_LEAST_ROWS, _MOST_ROWS = 8, 64


def form_of(config: TransformerConfig) -> str:
    """The form configured, or that of the platform that the program is compiled for."""
    return config.experts or _FORMS.get(target_platform(), "dense")


@flax.struct.dataclass
class Choice:
    """The experts of each token, and the form of their products (not ``dense``)."""

    experts_BSk: Int[Array, "B S k"]
    form: str = flax.struct.field(pytree_node=False)


def expert_product(
    equation: str, x: Float[Array, "B S *k I"], matrix: Matrix, choice: Choice
) -> Float[Array, "B S k O"]:
    """Each pair's row of x times its expert's matrix [I, O].

    Args:
      equation: ``bsd,edf->bskf`` or ``bskf,efd->bskd``, say; its letters tell how the matrix is
        split over a mesh.
      x: a row for each token, or for each pair.
      matrix: [E, I, O]; an int8 one is used as floats, one expert at a time (``ragged``: whole).
    """
    product = {"blocks": _block_product, "ragged": _ragged_product}[choice.form]

    def of_device(x: Array, matrix: Matrix, experts_BSk: Array) -> Array:
        rows, pairs = x.reshape(-1, x.shape[-1]), experts_BSk.reshape(-1)
        out = product(rows, matrix, pairs)
        return out.reshape(*experts_BSk.shape, out.shape[-1])

    out = _on_mesh(equation, of_device, x, matrix, choice.experts_BSk)
    return checkpoint_name(out, PRODUCT_NAME)


def _on_mesh(equation, of_device, x, matrix, experts_BSk):
    """Each device sorts the pairs of its own rows of the batch: over the whole batch, the loop over
    blocks would be the same on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return of_device(x, matrix, experts_BSk)
    operands, out_dims = equation.split("->")
    x_dims, matrix_dims = operands.split(",")
    divided = len(x) % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0
    # A matrix's D, which is split over a batch axis, is whole in a product.
    axes = {"b": BATCH_AXES if divided else None, "f": AXES_OF_DIM["F"]}

    def spec(dims: str, array: Array) -> P:
        """A scale of int8 has size 1 where it has no part of a dimension."""
        sizes = zip(dims, array.shape, strict=True)
        return P(*(axes.get(dim) if size > 1 else None for dim, size in sizes))

    def summed(*inputs: Array) -> Array:
        out = of_device(*inputs)
        return jax.lax.psum(out, axes["f"]) if matrix_dims[1] == "f" else out

    specs = (
        spec(x_dims, x),
        jax.tree.map(functools.partial(spec, matrix_dims), matrix),
        spec("bsk", experts_BSk),
    )
    return jax.shard_map(
        summed, in_specs=specs, out_specs=P(*map(axes.get, out_dims)), check_vma=False
    )(x, matrix, experts_BSk)


def _ragged_product(x_RI: Array, matrix: Matrix, experts_M: Array) -> Array:
    order_M = jnp.argsort(experts_M)
    rows_MI = x_RI[order_M // (len(experts_M) // len(x_RI))]
    sizes_E = jnp.bincount(experts_M, length=matrix.shape[0])
    out_MO = jax.lax.ragged_dot(rows_MI, matrix.astype(x_RI.dtype), sizes_E)
    return out_MO[jnp.argsort(order_M)]


class _Blocks(NamedTuple):
    """Pairs sorted by expert, in n blocks of b rows.

    Attributes:
      count: how many of the n blocks, the first ones, are not empty.
      experts_n: the expert of each.
      pairs_nb: the pair in each row; M, one beyond the last pair, in a row without one.
      rows_M: the row of each pair.
    """

    count: Int[Array, ""]
    experts_n: Int[Array, " n"]
    pairs_nb: Int[Array, "n b"]
    rows_M: Int[Array, " M"]


def _blocks_of(experts_M: Int[Array, " M"], n_experts: int) -> _Blocks:
    n_pairs = len(experts_M)
    # About half of an expert's mean number of pairs, as a power of two.
    b = 1 << max(n_pairs // (2 * n_experts), 1).bit_length() - 1
    b = min(max(b, _LEAST_ROWS), _MOST_ROWS)
    order_M = jnp.argsort(experts_M)
    ends_E = jnp.searchsorted(experts_M[order_M], jnp.arange(n_experts), side="right")
    starts_E = jnp.pad(ends_E, (1, 0))[:-1]
    blocks_E = -((starts_E - ends_E) // b)
    last_E = jnp.cumsum(blocks_E)
    first_E = last_E - blocks_E
    block_n = jnp.arange(min(n_pairs, n_pairs // b + n_experts))
    experts_n = jnp.searchsorted(last_E, block_n, side="right").clip(max=n_experts - 1)
    start_n = starts_E[experts_n] + (block_n - first_E[experts_n]) * b
    place_nb = start_n[:, None] + jnp.arange(b)[None]
    is_pair_nb = place_nb < ends_E[experts_n][:, None]
    pairs_nb = jnp.where(is_pair_nb, order_M[place_nb.clip(max=n_pairs - 1)], n_pairs)
    rows_M = first_E[experts_M] * b + jnp.argsort(order_M) - starts_E[experts_M]
    return _Blocks(last_E[-1], experts_n, pairs_nb, rows_M)


@jax.custom_vjp
def _block_product(x_RI: Array, matrix: Matrix, experts_M: Array) -> Array:
    """x has a row for each pair, or for each token: every k pairs, one after the other."""
    return _times(x_RI, matrix, _blocks_of(experts_M, matrix.shape[0]))


def _block_product_fwd(x_RI, matrix, experts_M):
    return _block_product(x_RI, matrix, experts_M), (x_RI, matrix, experts_M)


def _block_product_bwd(kept, out_bar_MO):
    """Two loops: a cotangent that nobody uses is not computed (XLA drops its loop)."""
    x_RI, matrix, experts_M = kept
    blocks = _blocks_of(experts_M, matrix.shape[0])
    x_bar_MI = _times(out_bar_MO, matrix, blocks, transposed=True)
    x_bar_RI = jnp.sum(x_bar_MI.reshape(len(x_RI), -1, x_RI.shape[-1]), axis=1)
    is_array = isinstance(matrix, jax.Array)
    matrix_bar = _matrix_bar(x_RI, out_bar_MO, matrix, blocks) if is_array else None
    return x_bar_RI, matrix_bar, None


_block_product.defvjp(_block_product_fwd, _block_product_bwd)


def _times(x_RI: Array, matrix: Matrix, blocks: _Blocks, *, transposed: bool = False) -> Array:
    """The product of each pair, in the order of the pairs [M, O]."""

    def run(block: Array, out_nbO: Array) -> Array:
        expert = jax.tree.map(lambda leaf: leaf[blocks.experts_n[block]], matrix)
        weight = expert.astype(x_RI.dtype)
        rows_bI = _rows(x_RI, blocks, block)
        return out_nbO.at[block].set(rows_bI @ (weight.T if transposed else weight))

    shape = (*blocks.pairs_nb.shape, matrix.shape[1 if transposed else 2])
    out_nbO = jax.lax.fori_loop(0, blocks.count, run, jnp.zeros(shape, x_RI.dtype))
    return out_nbO.reshape(-1, shape[-1])[blocks.rows_M]


def _matrix_bar(x_RI: Array, out_bar_MO: Array, matrix: Array, blocks: _Blocks) -> Array:
    """Summed in fp32 over the blocks of an expert."""

    def run(block: Array, bar_EIO: Array) -> Array:
        rows_bI, bar_bO = _rows(x_RI, blocks, block), _rows(out_bar_MO, blocks, block)
        added = jnp.matmul(rows_bI.T, bar_bO, preferred_element_type=jnp.float32)
        return bar_EIO.at[blocks.experts_n[block]].add(added)

    zeros = jnp.zeros(matrix.shape, jnp.float32)
    return jax.lax.fori_loop(0, blocks.count, run, zeros).astype(matrix.dtype)


def _rows(x_RI: Array, blocks: _Blocks, block: Array) -> Float[Array, "b I"]:
    """The rows of x in a block, zeros where it has no pair."""
    pairs_per_row = len(blocks.rows_M) // len(x_RI)
    rows_b = blocks.pairs_nb[block] // pairs_per_row
    return x_RI.at[rows_b].get(mode="fill", fill_value=0)
