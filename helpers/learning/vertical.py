"""Vertical split learning: parties hold different columns of the same rows, one of them the labels.

Every party has the first weights of its own columns. It sends what these make of its rows, the
activations. The party with the labels adds them up, does the rest of the network, and sends back
the gradient by the activations, from which each finds the gradient of its own weights. Columns,
labels and weights stay; the result is that of a network which sees all columns. (In the papers each
party may have layers of its own, whose outputs are put side by side. Here they are added up: that
is what makes the parties equal to one network.)

Sources: Vepakomma, Gupta, Swedish and Raskar 2018, "Split learning for health", section 3
(vertically partitioned data); Gupta and Raskar 2018, "Distributed learning of deep neural network
over multiple agents", algorithm 1.
"""

from __future__ import annotations

import operator

import numpy as np

from helpers.engine.collectives import broadcast, reduce
from helpers.learning.soft import cross_entropy
from helpers.nn import linear, linear_grad, relu, relu_grad

__all__ = ["Party", "learn_split"]

LABELS = 0
"""The number of the party that has the labels."""


class Party:
    """One party: its columns' first weights, and, if it has the labels, the rest of the network.

    Parameters
    ----------
    group : Group
        Rank 0 has the labels.
    first : array of shape (d, width)
        The first weights of this party's columns; they are changed.
    rest : list of array, optional
        On rank 0: biases of the first layer (width,), weights (width, 1) and biases (1,) of the
        last. None on the others.
    rate : float
        Learning rate.
    decay : float
        Weight decay: each step adds so much of the weights to their gradient.

    Attributes
    ----------
    first, rest
        As given, and trained.
    """

    def __init__(self, group, first, rest=None, rate=0.2, decay=0.0):
        if (rest is not None) != (group.rank == LABELS):
            raise ValueError(f"the rest of the network belongs to rank {LABELS}, and only to it.")
        self.group, self.first, self.rest, self.rate = group, first, rest, rate
        self.decay = decay

    def scores(self, x):
        """The scores of rows, on rank 0; None on the others. All call it together."""
        hidden = reduce(self.group, x @ self.first, root=LABELS)
        if self.rest is None:
            return None
        bias, w, b = self.rest
        return linear(relu(hidden + bias), w, b)[:, 0]

    def step(self, x, y=None):
        """One step of all parties on the same rows; returns the loss on rank 0, else None."""
        hidden, loss = reduce(self.group, x @ self.first, root=LABELS), None  # activations go up
        gradient = None
        if self.rest is not None:
            loss, gradient = self._rest_step(hidden, y)
        gradient = broadcast(self.group, gradient, root=LABELS)  # and their gradient comes down
        self._change(self.first, x.T @ gradient)
        return loss

    def _rest_step(self, hidden, y):
        """The loss, and the gradient by the activations; the rest of the network takes a step."""
        bias, w, b = self.rest
        h = relu(hidden + bias)
        loss, dz = cross_entropy(linear(h, w, b), y)
        dw, db, dh = linear_grad(dz, h, w)
        dh = relu_grad(dh, h)
        for array, change in ((bias, dh.sum(axis=0)), (w, dw), (b, db)):
            self._change(array, change)
        return loss, dh

    def _change(self, array, gradient):
        array -= self.rate * (gradient + self.decay * array)


def learn_split(group, network, columns, x, y, epochs, batch=64, rate=0.2, seed=0, decay=0.0):
    """Train a network whose columns lie with several parties.

    Parameters
    ----------
    group : Group
        One party on each rank.
    network : MLP
        With one hidden layer and one output, over the columns of all parties.
    columns : sequence of array of int
        For each party the places of its columns among the network's inputs.
    x : array of shape (n, d)
        This party's columns, in the order of its places.
    y : array of shape (n,) or None
        The labels, on rank 0.
    epochs, batch : int
    rate : float
    seed : int
        For the first parameters and the order of the rows, the same on all ranks.
    decay : float
        As for `Party`.

    Returns
    -------
    Party

    Raises
    ------
    ValueError
        If the network has another number of layers, or a column belongs to nobody or to two.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.nn import MLP
    >>> x, columns = np.random.default_rng(0).normal(size=(100, 4)), [[0, 1], [2, 3]]
    >>> def program(rank):
    ...     mine, y = x[:, columns[rank.index]], None if rank.index else x.sum(axis=1) > 0
    ...     party = learn_split(rank.world, MLP((4, 8, 1)), columns, mine, y, epochs=20, batch=10)
    ...     return party.scores(mine)
    >>> scores, nothing = spmd.run(None, Mesh(data=2), program).results
    >>> bool(np.mean((scores > 0) == (x.sum(axis=1) > 0)) > 0.95), nothing
    (True, None)
    """
    if len(network.widths) != 3 or network.widths[-1] != 1:
        raise ValueError(f"widths {network.widths}: split learning here has one hidden layer.")
    whole = np.concatenate([np.asarray(part, int) for part in columns])
    if not np.array_equal(np.sort(whole), np.arange(network.widths[0])):
        raise ValueError(f"the columns 0 to {network.widths[0] - 1} must each belong to one party.")
    (first, bias), (w, b) = network.views(network.initialise(seed, x.dtype))
    mine = np.ascontiguousarray(first[np.asarray(columns[group.rank], int)])
    party = Party(group, mine, [bias, w, b] if group.rank == LABELS else None, rate, decay)
    random = np.random.default_rng([seed, 2])
    for _ in range(operator.index(epochs)):
        order = random.permutation(len(x))
        for start in range(0, len(x), batch):
            rows = order[start : start + batch]
            party.step(x[rows], None if y is None else y[rows])
    return party
