"""The metrics of a lens, by exact definition, in float64 numpy.

Per-row functions take arrays whose first axis is the row (N rows, one activation each) and return
one number per row. The metrics of a data set are all *one minus a ratio of means* and go through
:func:`fraction_removed`, which also accepts a vector of resampled means: this is what lets
``bootstrap.py`` compute an interval without touching the rows again.

A metric without a value (a reference error of 0, say) is NaN, never a warning: one empty control
must not end an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


def _rows(name: str, values: npt.ArrayLike, ndim: int) -> Float64Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or array.shape[0] == 0:
        raise ValueError(f"{name} must have {ndim} axes and at least one row, not {array.shape}")
    return array


def _same_shape(**arrays: Float64Array) -> None:
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"these arrays must have the same shape: {shapes}")


# --- per row ------------------------------------------------------------------------------------


def unit_vectors(a_ND: npt.ArrayLike) -> Float64Array:
    """Each row divided by its Euclidean norm, ``[N, D]``; a zero row stays zero.

    Raises:
      ValueError: not two axes, or no rows.
    """
    a_ND = _rows("a_ND", a_ND, 2)
    # The largest entry is divided out first, so that squares neither overflow nor vanish.
    largest_N1 = np.max(np.abs(a_ND), axis=1, keepdims=True, initial=0.0)
    scaled_ND = a_ND / np.where(largest_N1 > 0, largest_N1, 1.0)
    norm_N1 = np.linalg.norm(scaled_ND, axis=1, keepdims=True)
    return scaled_ND / np.where(norm_N1 > 0, norm_N1, 1.0)


def cosine(a_ND: npt.ArrayLike, b_ND: npt.ArrayLike) -> Float64Array:
    """Cosine of the angle between the rows of a and b, ``[N]``; 0 where either is the zero vector.

    Raises:
      ValueError: the shapes differ.
    """
    unit_a_ND, unit_b_ND = unit_vectors(a_ND), unit_vectors(b_ND)
    _same_shape(a_ND=unit_a_ND, b_ND=unit_b_ND)
    return np.clip(np.einsum("nd,nd->n", unit_a_ND, unit_b_ND), -1.0, 1.0)


def mse_nrm(cos_N: npt.ArrayLike) -> Float64Array:
    """``2(1 − cos)``: the squared distance between the two unit vectors, between 0 and 4."""
    return 2.0 * (1.0 - np.asarray(cos_N, dtype=np.float64))


def squared_error(rec_ND: npt.ArrayLike, a_ND: npt.ArrayLike) -> Float64Array:
    """``‖rec − a‖²`` of each row, ``[N]``, in squared activation units; a may be one vector [D]."""
    rec_ND = _rows("rec_ND", rec_ND, 2)
    a_ND = np.asarray(a_ND, dtype=np.float64)
    if a_ND.shape not in (rec_ND.shape, rec_ND.shape[1:]):
        raise ValueError(f"a must have the shape of rec {rec_ND.shape} or of a row, {a_ND.shape}")
    return np.sum((rec_ND - a_ND) ** 2, axis=1)


def top1_agreement(top_N: npt.ArrayLike, top_clean_N: npt.ArrayLike) -> Float64Array:
    """Share of each row's predictions whose most likely token is unchanged, ``[N]``.

    Args:
      top_N: token ids ``[N]``, or ``[N, h]`` over a horizon: argmax of M with the swap.
      top_clean_N: the same without the swap.
    """
    top, clean = np.asarray(top_N), np.asarray(top_clean_N)
    _same_shape(top_N=top, top_clean_N=clean)
    if top.ndim not in (1, 2) or top.size == 0:
        raise ValueError(f"top_N must be [N] or [N, h] with at least one row, not {top.shape}")
    return (top == clean).reshape(len(top), -1).mean(axis=1, dtype=np.float64)


# --- of a data set ------------------------------------------------------------------------------


def fraction_removed(error: npt.ArrayLike, reference: npt.ArrayLike) -> Float64Array:
    """``1 − error / reference``, elementwise over (resampled) means: 1 is perfect, 0 is no better
    than the reference, below 0 is worse. NaN where the reference is 0."""
    error, reference = np.asarray(error, np.float64), np.asarray(reference, np.float64)
    # One rounding only, so that error == reference gives 0 and error == 0 gives 1 exactly.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(reference == 0, np.nan, (reference - error) / reference)


def resultant_length(a_ND: npt.ArrayLike) -> float:
    """``R``: the norm of the mean of the unit vectors, between 0 (no common direction) and 1.

    The mean resultant length of directional statistics (Mardia and Jupp, 2000). ``1 − R²`` is the
    mean squared distance of the unit vectors from their mean.
    """
    return float(min(np.linalg.norm(unit_vectors(a_ND).mean(axis=0)), 1.0))


def fve_nrm_reference(R: float) -> float:
    """``1 − R²``, the reference error of :func:`fve_nrm`.

    Raises:
      ValueError: R is not between 0 and 1.
    """
    if not 0.0 <= R <= 1.0:
        raise ValueError(f"R must be between 0 and 1, not {R}; use resultant_length")
    return 1.0 - R * R


def fve_nrm(cos_N: npt.ArrayLike, R: float) -> float:
    """Fraction of directional variance explained: ``1 − mean(2(1 − cos)) / (1 − R²)``.

    The reference is the mean unit vector *without* re-normalisation, the best constant guess in
    squared error. A constant guess has to be a direction here, so even the best one, the direction
    of the mean, gets ``−(1 − R)/(1 + R)``, a little below 0; 0 is reached at a mean cosine of
    ``(1 + R²)/2``, and 1 at perfect directions. NaN where all rows have one direction (R = 1).
    """
    mean_error = mse_nrm(_rows("cos_N", cos_N, 1)).mean()
    return float(fraction_removed(mean_error, fve_nrm_reference(R)))


def kl_frac(kl_N: npt.ArrayLike, kl_ref_N: npt.ArrayLike) -> float:
    """Fraction of the reference's KL removed: ``1 − mean(KL) / mean(KL_ref)``, a ratio of means.

    A mean of ratios would be dominated by rows where the reference happens to do no harm.
    """
    kl_N, kl_ref_N = _rows("kl_N", kl_N, 1), _rows("kl_ref_N", kl_ref_N, 1)
    return float(fraction_removed(kl_N.mean(), kl_ref_N.mean()))


def cross_entropy_recovered(
    ce_ref: npt.ArrayLike, ce_rec: npt.ArrayLike, ce_clean: npt.ArrayLike
) -> Float64Array:
    """``(CE_ref − CE_rec) / (CE_ref − CE_clean)`` of *mean* cross entropies (nats per token).

    1 where the reconstruction does as little harm as no swap, 0 where it does as much as the
    reference swap. Elementwise, for resampled means; NaN where the reference does no harm at all.
    """
    ce_ref, ce_rec, ce_clean = (np.asarray(ce, np.float64) for ce in (ce_ref, ce_rec, ce_clean))
    return fraction_removed(ce_rec - ce_clean, ce_ref - ce_clean)


# --- of texts -----------------------------------------------------------------------------------


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in ids[start : start + n]) for start in range(len(ids) - n + 1)]


def distinct_2(texts: Sequence[Sequence[int]]) -> float:
    """Different bigrams over all bigrams, across all texts together (Li et al., 2016).

    Near 0 where the decoder writes the same text for every row. No bigram crosses two texts; the
    value falls as texts are added, so compare equal numbers of texts only. It is not a mean over
    rows: a bootstrap repeats texts and would bias it. NaN where no text has two tokens.
    """
    bigrams = [bigram for ids in texts for bigram in _ngrams(ids, 2)]
    return len(set(bigrams)) / len(bigrams) if bigrams else float("nan")


def repeat_4gram(texts: Sequence[Sequence[int]]) -> Float64Array:
    """Share of the 4-grams of each text that it has already used, ``[N]``.

    ``1 − |different 4-grams| / |4-grams|``, seq-rep-4 of Welleck et al. (2020). 0 for a text of
    fewer than four tokens, which has nothing to repeat.
    """
    shares = []
    for ids in texts:
        ngrams = _ngrams(ids, 4)
        shares.append(1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return np.asarray(shares, dtype=np.float64)
