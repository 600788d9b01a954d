"""Linear maps and linear classifiers on activations: what can be read from them linearly.

The fits are scikit-learn's, imported where they are used: the import takes a second or two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_RIDGE = 1e-3
_PENALTY, _STEPS = 1e-3, 1000


def linear_map(
    x_ND: np.ndarray, y_NK: np.ndarray, ridge: float = _RIDGE
) -> Callable[[np.ndarray], np.ndarray]:
    """x [N, D] → y [N, K] by least squares, with a penalty of ``ridge`` times the mean variance of
    a coordinate of x (Hoerl and Kennard, 1970)."""
    from sklearn.linear_model import Ridge

    x_ND, y_NK = np.asarray(x_ND, np.float64), np.asarray(y_NK, np.float64)
    # scikit-learn's penalty is added to XᵀX, which grows with the number of rows.
    fitted = Ridge(alpha=ridge * len(x_ND) * x_ND.var(axis=0).mean()).fit(x_ND, y_NK)
    return lambda new_ND: fitted.predict(np.asarray(new_ND, np.float64))


def probe_values(
    train_ND: np.ndarray, labels_N: np.ndarray, values_K: np.ndarray, x_ND: np.ndarray
) -> np.ndarray:
    """The value that a linear classifier, multinomial logistic regression, reads from each x;
    −1 everywhere without a labelled row.

    The weights minimise the mean cross-entropy plus ``_PENALTY · ‖W‖² / 2`` (of two values: W is
    the difference of theirs). They are fitted on whitened activations: quickly, and with the same
    penalty in all directions.

    Args:
      labels_N: one of ``values_K``, or anything else for a row that is left out.
    """
    known = np.isin(labels_N, values_K)
    found = np.unique(labels_N[known])
    if len(found) < 2:
        return np.full(len(x_ND), found[0] if len(found) else -1, values_K.dtype)
    from sklearn.linear_model import LogisticRegression

    whiten = _whitening(train_ND[known])
    # scikit-learn sums the cross-entropy over rows and weighs it by C.
    classifier = LogisticRegression(C=1 / (_PENALTY * known.sum()), max_iter=_STEPS)
    classifier.fit(whiten(train_ND[known]), labels_N[known])
    return classifier.predict(whiten(x_ND)).astype(values_K.dtype)


def _whitening(train_ND: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """x → its principal components at unit variance. Directions with almost no variance are not
    amplified."""
    mean_D = np.asarray(train_ND, np.float64).mean(axis=0)
    centred_ND = np.asarray(train_ND, np.float64) - mean_D
    variances_D, axes_DD = np.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))
    scaled_DD = axes_DD / np.sqrt(np.maximum(variances_D, 0) + _RIDGE * variances_D.mean() + 1e-12)

    return lambda x_ND: (np.asarray(x_ND, np.float64) - mean_D) @ scaled_DD
