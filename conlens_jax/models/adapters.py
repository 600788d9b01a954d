"""Low-rank adapters of the layers' matrices (LoRA, Hu et al. 2021, arXiv:2106.09685).

A matrix W of a layer is used as W + s·A·B with A [inputs, r], B [r, outputs], r small and
s = alpha / r. The sum is never formed: :func:`~conlens_jax.models.block.run_block` adds
s·(x·A)·B to x·W if the layer's weights contain ``query_lora_in`` (A) and ``query_lora_out`` (s·B)
besides ``query``. So W can be shared with other models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from conlens_jax.models.families import family_of
from conlens_jax.models.layer_kinds import Layers, with_own
from conlens_jax.models.layer_shapes import used_mask
from conlens_jax.models.param_table import Params
from conlens_jax.models.transformer_config import TransformerConfig, array_dtype

LORA_IN, LORA_OUT = "_lora_in", "_lora_out"


def init_adapters(
    config: TransformerConfig, n_layers: int, targets: Sequence[str], rank: int, key: jax.Array
) -> Params:
    """Adapters that do not change the layers yet: A normal, B zero.

    A's standard deviation is 1/√inputs, so that x·A is as large as x for any width.

    Args:
      n_layers: the number of layers with adapters, the first ones of the model.
      targets: names of layer matrices, such as ``query``.

    Returns:
      ``{target: {"in": [N, *inputs, r], "out": [N, r, *outputs]}}``, in ``config.dtype``; with
      the experts after N if the matrix has them.
    """
    rows = {row.path[-1]: row for row in family_of(config).param_table(config) if row.stacked}
    dtype, sizes = array_dtype(config), config.dim_sizes
    adapters = {}
    for target, target_key in zip(targets, jax.random.split(key, len(targets)), strict=True):
        inputs, outputs = ([sizes[dim] for dim in dims] for dims in rows[target].matrix_dims)
        leading = (n_layers, config.n_experts) if rows[target].has_experts else (n_layers,)
        draw = jax.random.normal(target_key, (*leading, *inputs, rank), jnp.float32)
        used = used_mask(rows[target].matrix_dims[0], range(config.n_layers), config)
        if used is not None:
            # Otherwise what only fills a smaller layer's place would have a gradient.
            draw = jnp.where(used[:n_layers, ..., None], draw, 0.0)
        adapters[target] = {
            "in": (draw / math.sqrt(math.prod(inputs))).astype(dtype),
            "out": jnp.zeros((*leading, rank, *outputs), dtype),
        }
    return adapters


def with_adapters(layers: Layers, adapters: Params, scale: Float[Array, ""]) -> Layers:
    """The layers' own arrays and the adapters, under the names that the block looks up."""
    added = {}
    for target, adapter in adapters.items():
        out = adapter["out"]
        added[target + LORA_IN] = adapter["in"]
        # s·B is small; scaling x·A·B instead would take memory for a whole activation.
        added[target + LORA_OUT] = (out.astype(jnp.float32) * scale).astype(out.dtype)
    return with_own(layers, added)


def low_rank(
    equation: str, x: Array, lora_in: Array, lora_out: Array, einsum: Callable = jnp.einsum
) -> Array:
    """(x·A)·B for the einsum ``equation`` of x·W, for example ``"bsd,dhx->bshx"``; a first letter
    ``e`` of W is its expert, and each has an A and a B of its own."""
    operands, output = equation.split("->")
    inputs, matrix = operands.split(",")
    expert, dims = ("e", matrix[1:]) if matrix.startswith("e") else ("", matrix)
    contracted = "".join(dim for dim in dims if dim in inputs)
    produced = "".join(dim for dim in dims if dim not in inputs)
    rows = output.removesuffix(produced)
    low = einsum(f"{inputs},{expert}{contracted}r->{rows}r", x, lora_in)
    return einsum(f"{rows}r,{expert}r{produced}->{output}", low, lora_out)
