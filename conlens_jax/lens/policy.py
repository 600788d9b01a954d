"""The score-function gradient: D as a policy that is rewarded for what its text leads to.

For G texts y_1..y_G a row with costs c_1..c_G (what the loss says of each text; the reward is −c),

    ∇ E[c(y)] = E[ c(y) ∇ log p(y) ]                        (REINFORCE, Williams 1992)

stays true where a baseline that does not depend on y_i is taken from c_i. RLOO (Kool et al. 2019;
Ahmadian et al. 2024, arXiv:2402.14740) takes the mean cost of the other G − 1 texts and is
unbiased. GRPO (Shao et al. 2024, arXiv:2402.03300) takes the mean of all G and divides by their
standard deviation, so that every row pulls equally hard; one update a batch of texts, so no ratio
to clip. Nothing here differentiates the cost itself: E gets its direct gradient elsewhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GRPO_EPSILON = 1e-6


def advantages(cost_B: Float[Array, "B"], group_size: int, kind: str) -> Float[Array, "B"]:
    """Cost above the baseline of its group; rows b·G … b·G + G − 1 are one group."""
    cost_bG = cost_B.reshape(-1, group_size)
    centred = cost_bG - jnp.mean(cost_bG, axis=1, keepdims=True)
    if kind == "rloo":
        # c_i − mean of the others = (c_i − mean of all) · G / (G − 1)
        return (centred * (group_size / (group_size - 1))).reshape(-1)
    spread = jnp.sqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True))
    return (centred / (spread + GRPO_EPSILON)).reshape(-1)


def policy_loss(
    cost_B: Float[Array, "B"], log_p_B: Float[Array, "B"], group_size: int, kind: str
) -> Float[Array, ""]:
    """A term of value 0 whose gradient is the score-function estimate of ∇ mean E[cost].

    Args:
      cost_B: cost of each text; not differentiated.
      log_p_B: log-probability of each whole text under D, differentiable.
      group_size: G ≥ 2, texts a row, one behind the other.
      kind: ``"rloo"`` or ``"grpo"``.
    """
    advantage_B = advantages(jax.lax.stop_gradient(cost_B), group_size, kind)
    return jnp.mean(advantage_B * (log_p_B - jax.lax.stop_gradient(log_p_B)))
