"""Deep mutual learning: models on the same rows learn from the labels and from each other.

In every step all models predict the same batch, exchange these predictions, and each learns from
the labels and from the mean of what the others say. Nothing else travels: no weights, no
gradients, so the models may differ in size and kind.

Source: Zhang, Xiang, Hospedales and Lu 2018, "Deep mutual learning", equations 6 and 7. There the
models take turns within a step; here all step at once, as in the paper's section on several
processors. The two losses are blended, not added, so that steps are as long as those of a model
alone.
"""

from __future__ import annotations

import operator

import numpy as np

from helpers.engine.collectives import all_gather
from helpers.learning.soft import blend

__all__ = ["learn_mutually", "others_mean"]


def others_mean(group, p):
    """The mean of the other ranks' predictions; this rank's own where there is no other.

    Parameters
    ----------
    group : Group
    p : array of shape (n,)
        What this rank says about the rows; the same rows on all ranks.

    Returns
    -------
    array of shape (n,)
    """
    if group.size == 1:
        return p
    everybody = all_gather(group, p[np.newaxis], alike=True)
    return (everybody.sum(axis=0) - p) / (group.size - 1)


def learn_mutually(group, learner, x, y, epochs, weight=1.0, seed=0):
    """Train this rank's model together with those of the other ranks, on the same rows.

    Parameters
    ----------
    group : Group
        One model on each rank; their first parameters should differ.
    learner : helpers.learning.soft.Learner
        This rank's model; it is changed.
    x, y : array of shape (n, d) and (n,)
        Rows and labels, the same on all ranks.
    epochs : int
        How often to go through all rows.
    weight : float
        How much the others' predictions count beside the labels. 0: every model alone.
    seed : int
        For the order of the rows, the same on all ranks.

    Returns
    -------
    array of shape (steps,)
        This model's loss in each step.

    Raises
    ------
    ValueError
        If the weight is negative, or x and y do not fit.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.learning.soft import Learner
    >>> from helpers.nn import MLP
    >>> x = np.random.default_rng(0).normal(size=(100, 3))
    >>> def program(rank):
    ...     learner = Learner(MLP((3, 8, 1)), seed=rank.index, batch=10)
    ...     return learn_mutually(rank.world, learner, x, x[:, 0] > 0, epochs=20)
    >>> run = spmd.run(None, Mesh(data=2), program)
    >>> [bool(losses[-1] < losses[0] / 2) for losses in run.results]
    [True, True]
    """
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows and y {len(y)}: give as many.")
    y, losses = np.asarray(y, x.dtype), []
    random = np.random.default_rng([seed, 2])
    for _ in range(operator.index(epochs)):
        order = random.permutation(len(x))
        for start in range(0, len(x), learner.batch):
            rows = order[start : start + learner.batch]
            target = y[rows]
            if weight:
                said = others_mean(group, learner.probabilities(x[rows]))
                target = blend(target, said, weight)
            losses.append(learner.step(x[rows], target))
    return np.array(losses)
