"""Ensembles of models that are trained apart, each fit a task on a worker: bagging and stacking.

Both take models of scikit-learn, and give what its `BaggingClassifier` and `StackingClassifier`
give for the same samples and folds. Data are placed on the workers once, and each task gets the
numbers of its rows.

Sources: Breiman 1996, "Bagging predictors", section 1; Wolpert 1992, "Stacked generalization",
section 2; Breiman 1996, "Stacked regressions", section 2 (out-of-fold predictions).
"""

from __future__ import annotations

import operator

import numpy as np

__all__ = ["Stack", "bagging", "bootstrap_samples", "folds", "mean_probability", "stacking"]


def bootstrap_samples(rows, models, seed, size=None):
    """For each model the numbers of its rows, drawn with replacement.

    Parameters
    ----------
    rows, models : int
        How many there are.
    seed : int
    size : int, optional
        Rows of a sample. Default: as many as there are.

    Returns
    -------
    array of int, shape (models, size)

    Examples
    --------
    >>> bootstrap_samples(5, 2, seed=0).shape
    (2, 5)
    """
    if operator.index(rows) < 1 or operator.index(models) < 1:
        raise ValueError(f"{models} samples of {rows} rows: give 1 or more of each.")
    random = np.random.default_rng(seed)
    return random.integers(rows, size=(models, rows if size is None else size))


def bagging(client, model, x, y, samples, seeds=None):
    """Train a copy of a model on each sample of rows; the fits are tasks on the workers.

    Parameters
    ----------
    client : distributed.Client
    model : classifier of scikit-learn
        It is copied, never fitted itself.
    x, y : array of shape (n, d) and (n,), or futures of them
        Placed on the workers once.
    samples : sequence of array of int
        Row numbers of each copy, as `bootstrap_samples` gives them.
    seeds : sequence of int, optional
        For each copy its ``random_state``. Default: 0, 1, 2, …; models without one get none.

    Returns
    -------
    list of fitted models

    Raises
    ------
    ValueError
        If there is no sample, or not one seed for each.

    Examples
    --------
    >>> from sklearn.tree import DecisionTreeClassifier
    >>> samples = bootstrap_samples(len(x), models=16, seed=0)  # doctest: +SKIP
    >>> trees = bagging(client, DecisionTreeClassifier(), x, y, samples)  # doctest: +SKIP
    >>> mean_probability(trees, x_test)  # doctest: +SKIP
    """
    seeds = range(len(samples)) if seeds is None else seeds
    if not len(samples) or len(seeds) != len(samples):
        raise ValueError(f"{len(samples)} samples and {len(seeds)} seeds: give one for each, 1+.")
    x, y = _placed(client, x), _placed(client, y)
    futures = [
        client.submit(_fit, model, x, y, np.asarray(rows), int(seed), pure=False)
        for rows, seed in zip(samples, seeds)
    ]
    return client.gather(futures)


def mean_probability(models, x):
    """The mean of the probabilities of class 1 that the models give to rows; shape (n,)."""
    return np.mean([model.predict_proba(x)[:, 1] for model in models], axis=0)


def folds(rows, parts):
    """Cut row numbers into parts, one after the other: a list of arrays.

    Examples
    --------
    >>> [part.tolist() for part in folds(5, 2)]
    [[0, 1, 2], [3, 4]]
    """
    if not 2 <= operator.index(parts) <= rows:
        raise ValueError(f"{parts} folds of {rows} rows: give 2 to {rows}.")
    return np.array_split(np.arange(rows), parts)


class Stack:
    """Models of several kinds, and a last model that has learnt how far to trust each.

    Attributes
    ----------
    models : list of fitted models
    last : fitted model
        Its inputs are the probabilities that the others give.
    """

    def __init__(self, models, last):
        self.models, self.last = models, last

    def probabilities(self, x):
        """The probability of class 1 of rows; shape (n,)."""
        said = np.column_stack([model.predict_proba(x)[:, 1] for model in self.models])
        return self.last.predict_proba(said)[:, 1]


def stacking(client, models, last, x, y, parts):
    """Train models of several kinds, and a last one on their out-of-fold predictions.

    Each row is predicted by models that have not seen it: for every model and every fold one fit
    on all other folds, each a task. Only then is each model trained on all rows.

    Parameters
    ----------
    client : distributed.Client
    models : sequence of classifiers of scikit-learn
        With ``random_state`` set where they have one.
    last : classifier of scikit-learn
    x, y : array of shape (n, d) and (n,), or futures of them
    parts : sequence of array of int
        The folds: every row in exactly one.

    Returns
    -------
    Stack

    Raises
    ------
    ValueError
        If there are no models, or the folds do not hold every row once.

    Examples
    --------
    >>> stack = stacking(client, models, last, x, y, folds(len(x), 4))  # doctest: +SKIP
    >>> stack.probabilities(x_test)  # doctest: +SKIP
    """
    numbers = np.concatenate([np.asarray(part, int) for part in parts])
    if not models or not np.array_equal(np.sort(numbers), np.arange(len(numbers))):
        raise ValueError("stacking needs models, and folds that hold every row exactly once.")
    x, y = _placed(client, x), _placed(client, y)
    every = np.arange(len(numbers))
    held_out = [
        client.submit(_predict_fold, model, x, y, np.setdiff1d(every, part), part, pure=False)
        for model in models
        for part in parts
    ]
    whole = [client.submit(_fit, model, x, y, every, None, pure=False) for model in models]
    columns = np.empty((len(models), len(numbers)))
    columns[:, numbers] = np.reshape(np.concatenate(client.gather(held_out)), columns.shape)
    labels = client.submit(np.asarray, y, pure=False).result()
    return Stack(client.gather(whole), _copied(last).fit(columns.T, labels))


def _placed(client, array):
    """The array on a worker; a future stays what it is."""
    if hasattr(array, "key"):
        return array
    return client.scatter(np.asarray(array), hash=False)


def _copied(model, seed=None):
    from sklearn.base import clone

    model = clone(model)
    if seed is not None and "random_state" in model.get_params():
        model.set_params(random_state=seed)
    return model


def _fit(model, x, y, rows, seed):
    return _copied(model, seed).fit(x[rows], y[rows])


def _predict_fold(model, x, y, rows, part):
    return _fit(model, x, y, rows, None).predict_proba(x[part])[:, 1]
