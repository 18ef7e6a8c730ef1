"""How good are predicted probabilities: the area under the ROC curve, and the log loss."""

from __future__ import annotations

import numpy as np


def auc(y, p):
    """The chance that a row with label 1 gets a higher prediction than one with label 0.

    This is the area under the ROC curve: 0.5 for a guess, 1 for a perfect order. Ties count half
    (Mann-Whitney statistic; Hanley and McNeil 1982, "The meaning and use of the area under a
    receiver operating characteristic curve").

    Parameters
    ----------
    y : array of shape (n,)
        Labels, 0 or 1.
    p : array of shape (n,)
        Predictions; only their order counts.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If there are not both labels, or the numbers of values differ.

    Examples
    --------
    >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    y, p = np.asarray(y).astype(bool).ravel(), np.asarray(p, float).ravel()
    if y.size != p.size:
        raise ValueError(f"{y.size} labels and {p.size} predictions: give one for each.")
    ones = int(y.sum())
    if ones in (0, y.size):
        raise ValueError("all labels are alike: the AUC compares rows of two kinds.")
    _, place, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # equal values share their mean rank
    return float((ranks[place][y].sum() - ones * (ones + 1) / 2) / (ones * (y.size - ones)))


def log_loss(y, p):
    """The mean of ``-log`` of the probability that was given to what happened: 0 is perfect.

    Parameters
    ----------
    y, p : array of shape (n,)
        Labels 0 or 1, and probabilities. They are kept away from 0 and 1 by 1e-7.

    Returns
    -------
    float

    Examples
    --------
    >>> round(log_loss([0, 1], [0.5, 0.5]), 4)
    0.6931
    """
    y, p = np.asarray(y, float).ravel(), np.asarray(p, float).ravel()
    if y.size != p.size:
        raise ValueError(f"{y.size} labels and {p.size} predictions: give one for each.")
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def scores(y, p) -> dict[str, float]:
    """Both, by name: ``{"auc": …, "log_loss": …}``."""
    return {"auc": auc(y, p), "log_loss": log_loss(y, p)}
