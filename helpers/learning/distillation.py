"""Co-distillation: models on different rows agree on rows whose labels nobody needs to know.

Every worker trains on rows of its own, which it shows to nobody. Besides, all know some rows
without labels. Now and then each says what it thinks of these; the mean of what all say becomes a
soft label, from which each learns beside its own labels. Only predictions travel, and the others'
are used until the next exchange, so they may be old.

Sources: Anil et al. 2018, "Large scale distributed neural network training through online
distillation", algorithm 1; there old copies of the weights travel, and each worker asks these
itself. Predictions that travel instead, on rows that all may see: Li and Wang 2019, "FedMD"; on
rows without labels: Itahara et al. 2021, "Distillation-based semi-supervised federated learning".
The rival, averaging weights: McMahan et al. 2017, "Communication-efficient learning of deep
networks from decentralized data".
"""

from __future__ import annotations

import operator

import numpy as np

from helpers.engine.collectives import all_reduce
from helpers.learning.mutual import others_mean

__all__ = ["TEACHERS", "average_weights", "codistil"]

TEACHERS = ("all", "others", "self")


def codistil(group, learner, x, y, public, rounds, weight=1.0, warm_up=0, teacher="all"):
    """Train this rank's model on its own rows, and on what the ranks say about public ones.

    Parameters
    ----------
    group : Group
    learner : helpers.learning.soft.Learner
        This rank's model; it is changed.
    x, y : array of shape (n, d) and (n,)
        This rank's rows and labels; ranks may have different numbers of them.
    public : array of shape (m, d)
        Rows without labels, the same on all ranks.
    rounds : int
        How many epochs of the own rows; before each one predictions are exchanged.
    weight : float
        Public rows in a batch for each own row.
    warm_up : int
        So many of the rounds each trains alone first: a beginner has nothing to teach.
    teacher : {"all", "others", "self"}
        Whose mean is learnt from. "self" exchanges nothing: the control that shows what soft labels
        do by themselves.

    Raises
    ------
    ValueError
        If there is no such teacher, the weight is negative, or the warm-up is longer than all.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.learning.soft import Learner
    >>> from helpers.nn import MLP
    >>> x = np.random.default_rng(0).normal(size=(300, 3))
    >>> def program(rank):
    ...     mine, learner = x[rank.index : 200 : 2], Learner(MLP((3, 8, 1)), batch=10)
    ...     codistil(rank.world, learner, mine, mine[:, 0] > 0, x[200:], rounds=20)
    ...     return learner.probabilities(x[:5])
    >>> first, second = spmd.run(None, Mesh(data=2), program).results
    >>> bool(np.abs(first - second).max() < 0.2)
    True
    """
    if teacher not in TEACHERS:
        raise ValueError(f"there is no teacher {teacher!r}: choose {', '.join(TEACHERS)}.")
    if not weight >= 0:
        raise ValueError(f"weight is {weight}: give 0 or more.")
    if not 0 <= operator.index(warm_up) <= operator.index(rounds):
        raise ValueError(f"{warm_up} of {rounds} rounds to warm up: give 0 to {rounds}.")
    learner.epochs(x, y, warm_up)
    y = np.asarray(y, x.dtype)
    for _ in range(rounds - warm_up):
        said = _said(group, learner.probabilities(public), teacher)
        order = learner.random.permutation(len(x))
        for start in range(0, len(x), learner.batch):
            own = order[start : start + learner.batch]
            others = learner.random.integers(len(public), size=round(weight * len(own)))
            rows = np.concatenate([x[own], public[others]])
            learner.step(rows, np.concatenate([y[own], said[others]]))


def _said(group, p, teacher):
    """The soft labels of the public rows."""
    if teacher == "self":
        return p
    return others_mean(group, p) if teacher == "others" else all_reduce(group, p) / group.size


def average_weights(group, learner, x, y, rounds):
    """The rival of co-distillation: after each epoch of the own rows all take the mean weights.

    Parameters
    ----------
    group : Group
    learner : helpers.learning.soft.Learner
        This rank's model; its network and its first parameters must be those of all ranks.
    x, y : array of shape (n, d) and (n,)
        This rank's rows and labels.
    rounds : int
        How many epochs, and how many exchanges.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.learning.soft import Learner
    >>> from helpers.nn import MLP
    >>> x = np.random.default_rng(0).normal(size=(200, 3))
    >>> def program(rank):
    ...     mine, learner = x[rank.index :: 2], Learner(MLP((3, 8, 1)), batch=10)
    ...     average_weights(rank.world, learner, mine, mine[:, 0] > 0, rounds=3)
    ...     return learner.parameters
    >>> first, second = spmd.run(None, Mesh(data=2), program).results
    >>> bool(np.array_equal(first, second))
    True
    """
    for _ in range(operator.index(rounds)):
        learner.epochs(x, y)
        learner.parameters[:] = all_reduce(group, learner.parameters) / group.size
