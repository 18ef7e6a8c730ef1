"""Multi-task learning: several questions about the same rows share layers, and keep their own ends.

Each rank has a task: its own labels and its own last layer (its head). The layers below are shared:
their gradients are averaged over the ranks, and so they serve all tasks. Heads, labels and rows
stay where they are.

Source: Caruana 1997, "Multitask learning", section 1.2 (hard parameter sharing).
"""

from __future__ import annotations

import operator

import numpy as np

from helpers.engine.collectives import all_reduce
from helpers.learning.soft import loss_and_gradient

__all__ = ["learn_tasks", "shared_part"]


def shared_part(network):
    """Where the shared layers lie in the flat parameters: all but the last layer.

    Examples
    --------
    >>> from helpers.nn import MLP
    >>> shared_part(MLP((2, 3, 1)))
    slice(0, 9, None)
    """
    return slice(0, network.slices[-1][0])


def learn_tasks(group, learner, x, y, epochs, seed=0, share=True):
    """Train this rank's task together with those of the other ranks.

    Parameters
    ----------
    group : Group
        One task on each rank.
    learner : helpers.learning.soft.Learner
        This rank's model. The shared layers must start equal on all ranks.
    x : array of shape (n, d)
        Rows; as many on all ranks, and for tasks about the same rows the same.
    y : array of shape (n,)
        This task's labels, 0 to 1.
    epochs : int
    seed : int
        For the order of the rows, the same on all ranks.
    share : bool
        False: every task alone, the control.

    Returns
    -------
    array of shape (steps,)
        This task's loss in each step.

    Raises
    ------
    ValueError
        If x and y do not fit.
    """
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows and y {len(y)}: give as many.")
    y, shared, losses = np.asarray(y, x.dtype), shared_part(learner.network), []
    random, workspace = np.random.default_rng([seed, 2]), learner.network.workspace(dtype=x.dtype)
    for _ in range(operator.index(epochs)):
        order = random.permutation(len(x))
        for start in range(0, len(x), learner.batch):
            rows = order[start : start + learner.batch]
            loss, gradient = loss_and_gradient(
                *(learner.network, learner.parameters, x[rows], y[rows]), workspace=workspace
            )
            if share:
                gradient[shared] = all_reduce(group, gradient[shared]) / group.size
            learner.optimiser.step(learner.parameters, gradient, learner.state)
            losses.append(loss)
    return np.array(losses)
