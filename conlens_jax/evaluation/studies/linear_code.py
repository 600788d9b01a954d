"""A linear autoencoder with as many bits as a text: the most that T tokens could carry, without
words.

Principal components of training activations, each stored with a whole number of bits by a scalar
quantiser. A text of T tokens from V has at most T·log2(V) bits.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

_MOST_BITS = 8
_LLOYD_STEPS = 20


def bits_of_text(text_len: int, vocab_size: int) -> int:
    """``floor(T · log2 V)``."""
    return math.floor(text_len * math.log2(vocab_size))


def allocate_bits(variances_C: np.ndarray, n_bits: int) -> np.ndarray:
    """Bits of each component, [C]: each bit goes to the component with the largest error.

    Another bit divides the error of a component by four, the law of fine quantisers (Gersho and
    Gray, 1992); greedy choices are then optimal.
    """
    bits_C = np.zeros(len(variances_C), np.int64)
    error_C = np.asarray(variances_C, np.float64).copy()
    for _ in range(n_bits):
        worst = int(np.argmax(error_C))
        if error_C[worst] <= 0:
            break
        bits_C[worst] += 1
        error_C[worst] = error_C[worst] / 4 if bits_C[worst] < _MOST_BITS else 0.0
    return bits_C


def lloyd_levels(values_N: np.ndarray, n_levels: int) -> np.ndarray:
    """The levels of a scalar quantiser with a small squared error (Lloyd, 1982), ascending; they
    start at equal quantiles."""
    values_N = np.sort(np.asarray(values_N, np.float64))
    levels_l = np.quantile(values_N, (np.arange(n_levels) + 0.5) / n_levels)
    for _ in range(_LLOYD_STEPS):
        nearest_N = np.searchsorted((levels_l[1:] + levels_l[:-1]) / 2, values_N)
        counts_l = np.bincount(nearest_N, minlength=n_levels)
        sums_l = np.bincount(nearest_N, values_N, minlength=n_levels)
        # A level that no value is nearest to stays where it is.
        levels_l = np.where(counts_l > 0, sums_l / np.maximum(counts_l, 1), levels_l)
    return levels_l


@dataclasses.dataclass(frozen=True)
class LinearCode:
    """Fitted on training activations; calling it encodes and decodes.

    Attributes:
      axes_CD: the components that have bits, unit vectors.
      levels: the quantiser of each.
    """

    mean_D: np.ndarray
    axes_CD: np.ndarray
    levels: tuple[np.ndarray, ...]

    @property
    def bits(self) -> float:
        return sum(math.log2(len(levels)) for levels in self.levels)

    @staticmethod
    def fit(activations_ND: np.ndarray, n_bits: int) -> LinearCode:
        wide_ND = np.asarray(activations_ND, np.float64)
        mean_D = wide_ND.mean(axis=0)
        centred_ND = wide_ND - mean_D
        variances_C, axes_DC = np.linalg.eigh(centred_ND.T @ centred_ND / len(wide_ND))
        bits_C = allocate_bits(variances_C, n_bits)
        used = np.flatnonzero(bits_C)
        axes_CD = axes_DC.T[used]
        codes_NC = centred_ND @ axes_CD.T
        levels = (
            lloyd_levels(codes_NC[:, column], 2 ** int(bits))
            for column, bits in enumerate(bits_C[used])
        )
        return LinearCode(mean_D, axes_CD, tuple(levels))

    def __call__(self, activations_ND: np.ndarray) -> np.ndarray:
        """The decoded activations, fp32 [N, D]."""
        codes_NC = (np.asarray(activations_ND, np.float64) - self.mean_D) @ self.axes_CD.T
        for column, levels in enumerate(self.levels):
            nearest_N = np.searchsorted((levels[1:] + levels[:-1]) / 2, codes_NC[:, column])
            codes_NC[:, column] = levels[nearest_N]
        return (codes_NC @ self.axes_CD + self.mean_D).astype(np.float32)
