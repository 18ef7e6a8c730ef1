"""Many rows, few labels: a model, or two that look at different columns, make labels of their own.

Self-training: a model labels the rows of which it is most sure, learns from these too, and goes on
so. The labels are called pseudo-labels since Lee 2013, who gives one to every row in every step,
with a weight that grows; here only the surest rows get one, and it counts like any label.

Co-training: two models that see different columns (views) do so for each other. It is sound when
each view would be enough by itself, and the views are independent, given the label.

Sources: Yarowsky 1995, "Unsupervised word sense disambiguation rivaling supervised methods"
(self-training); Lee 2013, "Pseudo-label", section 2.2; Blum and Mitchell 1998, "Combining labeled
and unlabeled data with co-training", table 1 and theorem 1.
"""

from __future__ import annotations

import operator

import numpy as np

from helpers.engine.collectives import all_gather

__all__ = ["co_train", "most_certain", "pseudo_labels"]


def most_certain(p, positive, negative):
    """The rows of which a model is most sure, and the labels that it gives them.

    Parameters
    ----------
    p : array of shape (n,)
        Probabilities of class 1.
    positive, negative : int
        How many rows of each class to name: those with the largest and the smallest probability.

    Returns
    -------
    rows : array of int
        First the positive ones.
    labels : array of float
        1 or 0.

    Raises
    ------
    ValueError
        If there are fewer rows than are to be named.

    Examples
    --------
    >>> rows, labels = most_certain(np.array([0.2, 0.9, 0.5, 0.1]), 1, 2)
    >>> rows.tolist(), labels.tolist()
    ([1, 3, 0], [1.0, 0.0, 0.0])
    """
    if min(positive, negative) < 0 or positive + negative > len(p):
        raise ValueError(f"{positive} + {negative} of {len(p)} rows are to be named: too many.")
    order = np.argsort(p, kind="stable")
    rows = np.concatenate([order[len(p) - positive :][::-1], order[:negative]])
    return rows, np.repeat([1.0, 0.0], [positive, negative])


def pseudo_labels(fit, x, y, unlabelled, rounds, positive, negative):
    """Label the surest rows, learn from all labels, and repeat.

    Parameters
    ----------
    fit : callable
        ``fit(x, y)`` trains a new model; ``model(x)`` gives its probabilities.
    x, y : array of shape (n, d) and (n,)
        The rows with labels.
    unlabelled : array of shape (m, d)
    rounds : int
    positive, negative : int
        Rows of each class that are labelled in a round.

    Returns
    -------
    model
        As `fit` gives it.
    """
    y, left = np.asarray(y, x.dtype), unlabelled
    model = fit(x, y)
    for _ in range(operator.index(rounds)):
        rows, labels = most_certain(model(left), positive, negative)
        x, y = np.concatenate([x, left[rows]]), np.concatenate([y, labels.astype(x.dtype)])
        left = np.delete(left, rows, axis=0)
        model = fit(x, y)
    return model


def co_train(group, fit, x, y, unlabelled, rounds, positive, negative):
    """Two ranks that see different columns of the same rows label rows for each other.

    Only row numbers and labels travel, never columns.

    Parameters
    ----------
    group : Group
        Two ranks or more; each has its own view.
    fit : callable
        As for `pseudo_labels`.
    x : array of shape (n, d)
        This rank's columns of the rows with labels.
    y : array of shape (n,)
        The labels, known to all.
    unlabelled : array of shape (m, d)
        This rank's columns of the other rows, in the same order on all ranks.
    rounds, positive, negative : int
        As for `pseudo_labels`, for each rank.

    Returns
    -------
    model
        This rank's, as `fit` gives it.

    Raises
    ------
    ValueError
        If rows run out.
    """
    x, y, left = np.asarray(x), np.asarray(y, float), np.arange(len(unlabelled))
    model = fit(x, y)
    for _ in range(operator.index(rounds)):
        rows, labels = most_certain(model(unlabelled[left]), positive, negative)
        named = all_gather(group, np.stack([left[rows], labels]), axis=1)
        # When two name the same row, the first rank's label counts.
        rows, first = np.unique(named[0].astype(int), return_index=True)
        x, y = np.concatenate([x, unlabelled[rows]]), np.concatenate([y, named[1, first]])
        left = np.setdiff1d(left, rows)
        model = fit(x, y)
    return model
