"""Linear maps from activations, by ridge regression: what can be read from them at all."""

from __future__ import annotations

import dataclasses

import numpy as np

_RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """``y = (x − mean) W + bias``; W is [D, K]."""

    mean_D: np.ndarray
    kernel_DK: np.ndarray
    bias_K: np.ndarray

    @staticmethod
    def fit(x_ND: np.ndarray, y_NK: np.ndarray, ridge: float = _RIDGE) -> LinearMap:
        """Least squares with a penalty of ``ridge`` times the mean variance of a coordinate of x.

        ``W = (XᵀX / N + λ I)⁻¹ XᵀY / N`` with x and y centred (Hoerl and Kennard, 1970).
        """
        x_ND, y_NK = np.asarray(x_ND, np.float64), np.asarray(y_NK, np.float64)
        mean_D, bias_K = x_ND.mean(axis=0), y_NK.mean(axis=0)
        x_ND = x_ND - mean_D
        covariance_DD = x_ND.T @ x_ND / len(x_ND)
        penalty = ridge * np.trace(covariance_DD) / len(covariance_DD)
        kernel_DK = np.linalg.solve(
            covariance_DD + penalty * np.eye(len(covariance_DD)),
            x_ND.T @ (y_NK - bias_K) / len(x_ND),
        )
        return LinearMap(mean_D, kernel_DK, bias_K)

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        return (np.asarray(x_ND, np.float64) - self.mean_D) @ self.kernel_DK + self.bias_K


def probe_values(
    train_ND: np.ndarray, labels_N: np.ndarray, values_K: np.ndarray, x_ND: np.ndarray
) -> np.ndarray:
    """The value that a linear classifier reads from each x: ridge regression on one-hot labels, the
    highest score wins. Without a labelled row it reads −1 everywhere.

    Args:
      labels_N: one of ``values_K``, or anything else for a row that is left out.
    """
    known = np.isin(labels_N, values_K)
    if not known.any():
        return np.full(len(x_ND), -1, values_K.dtype)
    one_hot_NK = (labels_N[known, None] == values_K).astype(np.float64)
    scores_NK = LinearMap.fit(train_ND[known], one_hot_NK)(x_ND)
    return values_K[np.argmax(scores_NK, axis=1)]
