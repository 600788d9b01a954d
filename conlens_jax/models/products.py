"""The matrix products of a layer: computed once, and reused in the backward pass.

The hand-written backward pass (:mod:`conlens_jax.models.backward`) needs a layer's derivative at
one token, or at all of them, more than once. Only matrix products are expensive, and a product is
linear: if its result is known, the derivative needs only its matrix.
"""

from __future__ import annotations

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from conlens_jax.models import quantized
from conlens_jax.models.adapters import LORA_IN, LORA_OUT, low_rank
from conlens_jax.models.experts import Choice, expert_product
from conlens_jax.models.param_table import Params


@flax.struct.dataclass
class TransposedMatrix:
    """A matrix [*inputs, *outputs], kept as [outputs, inputs] for products with few rows.

    On a CPU these are faster if the weights are the left operand: (Wᵀ xᵀ)ᵀ took 0.73 to 0.84 of
    the CPU time of x W for 4 to 64 rows in fp32, 0.93 to 1.05 for 1 row, 128 or more, and in bf16.
    The results are equal.
    """

    values_OI: Float[Array, "O I"]
    outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, matrix: Float[Array, "..."], n_inputs: int) -> TransposedMatrix:
        outputs = matrix.shape[n_inputs:]
        return cls(matrix.reshape(-1, math.prod(outputs)).T, outputs)

    def after(self, x: Float[Array, "*B I"]) -> Float[Array, "..."]:
        """x times the matrix, [*B, *outputs]."""
        # Without the barriers XLA would move the transposes into the product.
        x_IR = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
        out_OR = jax.lax.optimization_barrier(self.values_OI @ x_IR)
        return out_OR.T.reshape(*x.shape[:-1], *self.outputs)


class Products:
    """``products(equation, x, name)`` is x times the layer's matrix ``name``, with its low-rank
    adapter and its bias if it has them; with a ``choice``, for each token's experts only.

    Args:
      weights: parameters of one layer.
      known: results by name, from a pass with the same inputs; the others are computed.

    Attributes:
      made: the results so far, by name.
    """

    def __init__(self, weights: Params, known: dict[str, Array] | None = None):
        self.weights, self.known = weights, known or {}
        self.made: dict[str, Array] = {}

    def __call__(self, equation: str, x: Array, name: str, choice: Choice | None = None) -> Array:
        parts = (name, name + LORA_IN, name + LORA_OUT, name + "_bias")
        weights = {part: self.weights[part] for part in parts if part in self.weights}
        if name in self.known:
            result = _recalled(equation, name, x, weights, choice, self.known[name])
        else:
            result = _product(equation, name, x, weights, choice)
        self.made[name] = result
        return result


def _product(equation: str, name: str, x: Array, weights: Params, choice: Choice | None) -> Array:
    bias = weights.get(name + "_bias")
    if choice is None:
        multiply, einsum = _as_matrices, jnp.einsum
        bias_of = lambda out: jax.lax.broadcast_to_rank(bias, out.ndim)
    else:
        multiply = einsum = functools.partial(expert_product, choice=choice)
        bias_of = lambda out: bias[choice.experts_BSk]
    out = multiply(equation, x, weights[name])
    if name + LORA_IN in weights:
        out += low_rank(equation, x, weights[name + LORA_IN], weights[name + LORA_OUT], einsum)
    return out if bias is None else out + bias_of(out)


def _as_matrices(equation: str, x: Array, weight: quantized.Matrix | TransposedMatrix) -> Array:
    """``einsum(equation, x, weight)``, the weight as one matrix [inputs, outputs] if it is one.

    Its transpose, in the backward pass, is then a matrix product too. XLA would instead copy a
    weight [D, H, X] transposed, for every token that is visited.
    """
    operands, out_dims = equation.split("->")
    x_dims, weight_dims = operands.split(",")
    inputs = sum(dim in x_dims for dim in weight_dims)
    is_matrix = (
        x_dims.endswith(weight_dims[:inputs])
        and out_dims == x_dims[:-inputs] + weight_dims[inputs:]
    )
    if not is_matrix or isinstance(weight, quantized.Int8Matrix):
        return quantized.einsum(equation, x, weight)
    batch = x.shape[: x.ndim - inputs]
    if isinstance(weight, TransposedMatrix):
        return weight.after(x.reshape(*batch, -1))
    outputs = weight.shape[inputs:]
    matrix = weight.reshape(-1, math.prod(outputs))
    return (x.reshape(*batch, -1) @ matrix).reshape(*batch, *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recalled(equation, name, x, weights, choice, known):
    """``known``, with the derivative of the product whose result it is."""
    del equation, name, x, weights, choice
    return known


def _recalled_fwd(equation, name, x, weights, choice, known):
    del equation, name
    return known, (x, weights, choice)


def _recalled_bwd(equation, name, kept, bar):
    x, weights, choice = kept
    product = functools.partial(_product, equation, name, choice=choice)
    # The value that vjp computes besides the derivative is not used: XLA drops it.
    return (*jax.vjp(product, x, weights)[1](bar), None, None)


_recalled.defvjp(_recalled_fwd, _recalled_bwd)
