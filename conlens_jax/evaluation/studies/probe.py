"""Linear maps and linear classifiers on activations: what can be read from them linearly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

_RIDGE = 1e-3
_PENALTY, _STEPS = 1e-3, 150


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
    """The value that a linear classifier, multinomial logistic regression, reads from each x;
    −1 everywhere without a labelled row.

    Args:
      labels_N: one of ``values_K``, or anything else for a row that is left out.
    """
    known = np.isin(labels_N, values_K)
    if not known.any():
        return np.full(len(x_ND), -1, values_K.dtype)
    whiten = _whitening(train_ND[known])
    one_hot_NK = (labels_N[known, None] == values_K).astype(np.float64)
    kernel_DK = logistic_regression(whiten(train_ND[known]), one_hot_NK)
    return values_K[np.argmax(whiten(x_ND) @ kernel_DK, axis=1)]


def logistic_regression(x_ND: np.ndarray, one_hot_NK: np.ndarray) -> np.ndarray:
    """W [D, K] of ``softmax(x W)``: least mean cross-entropy plus ``_PENALTY · ‖W‖² / 2``.

    Accelerated gradient descent (Nesterov, 1983). The curvature is at most half the largest
    eigenvalue of ``xᵀx / N`` plus the penalty, which is the step's size; on whitened x it is the
    same in all directions, so that a hundred steps are plenty.
    """
    count = len(x_ND)
    curvature = 0.5 * np.linalg.norm(x_ND, 2) ** 2 / count + _PENALTY
    kernel_DK = ahead_DK = np.zeros((x_ND.shape[1], one_hot_NK.shape[1]))
    for step in range(_STEPS):
        logits_NK = x_ND @ ahead_DK
        share_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
        share_NK /= share_NK.sum(axis=1, keepdims=True)
        gradient_DK = x_ND.T @ (share_NK - one_hot_NK) / count + _PENALTY * ahead_DK
        before_DK, kernel_DK = kernel_DK, ahead_DK - gradient_DK / curvature
        ahead_DK = kernel_DK + step / (step + 3) * (kernel_DK - before_DK)
    return kernel_DK


def _whitening(train_ND: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """x → its principal components at unit variance, followed by a constant 1. Directions with
    almost no variance are not amplified."""
    mean_D = np.asarray(train_ND, np.float64).mean(axis=0)
    centred_ND = np.asarray(train_ND, np.float64) - mean_D
    variances_D, axes_DD = np.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))
    scaled_DD = axes_DD / np.sqrt(np.maximum(variances_D, 0) + _RIDGE * variances_D.mean() + 1e-12)

    def whiten(x_ND: np.ndarray) -> np.ndarray:
        components_ND = (np.asarray(x_ND, np.float64) - mean_D) @ scaled_DD
        return np.concatenate([components_ND, np.ones((len(x_ND), 1))], axis=1)

    return whiten
