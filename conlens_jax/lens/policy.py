"""The score-function gradient: the decoder as a policy whose reward is minus the loss of its text.

For k texts y_1..y_k per row with costs c_1..c_k (the loss of each text),

    ∇ 𝔼[c(y)] = 𝔼[ c(y) ∇ log p(y) ]                        (REINFORCE, Williams 1992)

remains true when a baseline that does not depend on y_i is subtracted from c_i. RLOO (Kool et al.
2019; Ahmadian et al. 2024, arXiv:2402.14740) subtracts the mean cost of the other k − 1 texts and
is unbiased. GRPO (Shao et al. 2024, arXiv:2402.03300) subtracts the mean of all k and divides by
their standard deviation, so that all rows have the same weight; there is one update per batch of
texts, so no ratio to clip. The cost itself is not differentiated here: the encoder's gradient comes
from the other terms of the loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GRPO_EPSILON = 1e-6


def advantages(cost_B: Float[Array, "B"], group_size: int, kind: str) -> Float[Array, "B"]:
    """The cost minus the baseline of its group; texts r k … r k + k − 1 are the group of row r."""
    cost_Rk = cost_B.reshape(-1, group_size)
    centred = cost_Rk - jnp.mean(cost_Rk, axis=1, keepdims=True)
    if kind == "rloo":
        # c_i − mean of the others = (c_i − mean of all) · k / (k − 1)
        return (centred * (group_size / (group_size - 1))).reshape(-1)
    spread = jnp.sqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True))
    return (centred / (spread + GRPO_EPSILON)).reshape(-1)


def policy_loss(
    cost_B: Float[Array, "B"], log_p_B: Float[Array, "B"], group_size: int, kind: str
) -> Float[Array, ""]:
    """A term of value 0 whose gradient is the score-function estimate of ∇ 𝔼[mean cost].

    Args:
      cost_B: cost of each text; not differentiated.
      log_p_B: log-probability of each whole text under the decoder, differentiable.
      group_size: k ≥ 2, the number of consecutive texts of one row.
      kind: ``"rloo"`` or ``"grpo"``.
    """
    advantage_B = advantages(jax.lax.stop_gradient(cost_B), group_size, kind)
    return jnp.mean(advantage_B * (log_p_B - jax.lax.stop_gradient(log_p_B)))
