"""Rows whose explanation should not be believed, and why: one sentence for each reason."""

from __future__ import annotations

from conlens_jax.measurement.training_range import OUTSIDE, TrainingRange


def row_warnings(
    trained_on: TrainingRange, position: int, norm: float, token_id: int, token: str
) -> tuple[str, ...]:
    """What training never had at this row: nothing of what is not recorded.

    Args:
      position: index into the tokens of the text.
      norm: of the activation.
      token: printable.
    """
    found = []
    first, last = trained_on.first_position, trained_on.last_position
    if first is not None and position < first:
        found.append(f"Training had no position before {first}.")
    if last is not None and position > last:
        found.append(f"Training had no position after {last}.")
    found += norm_warnings(trained_on, norm)
    if not trained_on.has_token(token_id):
        found.append(f"No training text had the token “{token}”.")
    return tuple(found)


def norm_warnings(trained_on: TrainingRange, norm: float) -> tuple[str, ...]:
    """Of an activation whose norm is outside those of training."""
    if trained_on.norms is None:
        return ()
    low, high = trained_on.norms
    if low <= norm <= high:
        return ()
    side, end = ("below", low) if norm < low else ("above", high)
    return (
        f"The activation's norm, {norm:.4g}, is {side} {end:.4g}, the limit of all but "
        f"{OUTSIDE * 1000:.0f} in 1000 training activations.",
    )


def reading_warnings(kl: float, kl_mean: float) -> tuple[str, ...]:
    """Of a reconstruction that M is no better off with than with the mean activation.

    Args:
      kl, kl_mean: KL(M ‖ M with the reconstruction, or with the mean activation, swapped in), nats.
    """
    if kl <= kl_mean:
        return ()
    return (
        "Its reconstruction changes M's prediction more than the mean activation does (KL "
        f"{kl:.3g} and {kl_mean:.3g} nats).",
    )
