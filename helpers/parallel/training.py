"""A loop around `DataParallel`, and batches that do not depend on the number of ranks."""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np

from helpers.engine.collectives import all_reduce
from helpers.parallel.data import DataParallel
from helpers.parallel.shards import shard


class Batches:
    """Random batches of a table or a text: the same rows however many ranks share them.

    The rows are shuffled, gone through batch by batch, and shuffled anew. A batch may begin in one
    round and end in the next, so that all are equally large.

    Parameters
    ----------
    x, y : array of n rows
        The whole table, or all lines, on each rank. They are only read: ranks that are threads may
        share them.
    rows : int
        Rows of one batch, all ranks together: 1 to n.
    seed : int
        Not negative. The same on all ranks.
    counted : function, optional
        Of the targets of a batch: how many of them count. For text `GPT.counted`; else all count.

    Raises
    ------
    ValueError
        If x and y have different numbers of rows, or a batch is empty or larger than the table.
    TypeError
        If the number of rows is not whole.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> x = np.arange(6.0).reshape(6, 1)
    >>> batches = Batches(x, x[:, 0], rows=4)
    >>> def program(rank):
    ...     return batches(7, rank.data)[1].tolist()
    >>> whole, = spmd.run(None, Mesh(data=1), program).results
    >>> shards = spmd.run(None, Mesh(data=3), program).results
    >>> sum(shards, start=[]) == whole, [len(part) for part in shards]
    (True, [2, 1, 1])
    """

    def __init__(self, x, y, rows, seed=0, counted=len):
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows and y {len(y)}: give as many.")
        if not 1 <= operator.index(rows) <= len(x):
            raise ValueError(f"a batch of {rows} rows: the table has {len(x)}, give 1 to {len(x)}.")
        self.x, self.y, self.rows, self.seed = x, y, operator.index(rows), seed
        self.counted = counted
        self._orders = {}  # round -> order of the rows; the last two are kept

    def numbers(self, step):
        """The numbers of the rows of a batch, in order; shape (rows,), int64."""
        around, start = divmod(operator.index(step) * self.rows, len(self.x))
        found = self._order(around)[start : start + self.rows]
        if len(found) < self.rows:
            found = np.append(found, self._order(around + 1)[: self.rows - len(found)])
        return found

    def __call__(self, step, group):
        """This rank's part of a batch: ``(x, y, divisor)``, the divisor that of the whole batch."""
        numbers = self.numbers(step)
        mine = numbers[shard(self.rows, group)]
        return self.x[mine], self.y[mine], self.counted(self.y[numbers])

    def _order(self, around):
        orders = self._orders  # other threads never change it, they put a new one in its place
        if around not in orders:
            order = np.random.default_rng([self.seed, around]).permutation(len(self.x))
            orders = {n: known for n, known in orders.items() if n == around - 1} | {around: order}
            self._orders = orders
        return orders[around]


class Training(NamedTuple):
    """What a training gave, the same bits on all ranks.

    Attributes
    ----------
    parameters : float array of shape (size,)
    losses : array of shape (steps,), float64
        The mean loss of each batch, before its step.
    """

    parameters: np.ndarray
    losses: np.ndarray


def train(
    rank,
    model,
    optimiser,
    batches,
    steps,
    *,
    parameters=None,
    seed=0,
    dtype=None,
    rate=None,
    **options,
):
    """Train a network with all ranks of a group.

    Parameters
    ----------
    rank : Rank
    model : Network
        An `MLP`, a `GPT`, or another one with the methods of `helpers.nn.Network`.
    optimiser : SGD or Adam
    batches : callable
        ``batches(step, group)`` is ``(x, y, divisor)``: what `DataParallel.step` is given in a step
        (counted from 0). `Batches` is one.
    steps : int
    parameters : float array of shape (size,), optional
        Where to start, the same on all ranks; they are changed in place. Default: initialised.
    seed : int
        For the initial parameters.
    dtype : dtype
        Of the initial parameters.
    rate : callable, optional
        ``rate(step)`` is the learning rate. Default: the optimiser's own.
    **options
        Of `DataParallel`: ``group``, ``bucket_bytes``, ``overlap``, ``microbatches``,
        ``largest_norm``, ``algorithm``.

    Returns
    -------
    Training

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        As for `DataParallel`.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> from helpers.nn import MLP, SGD
    >>> x = np.random.default_rng(0).normal(size=(100, 3))
    >>> batches = Batches(x, x[:, 0] > 0, rows=20)
    >>> run = spmd.run(None, Mesh(data=2), train, MLP((3, 8, 1)), SGD(0.5), batches, 50)
    >>> first, second = run.results
    >>> first.losses[[0, -1]].round(1).tolist(), np.array_equal(first.losses, second.losses)
    ([0.6, 0.1], True)
    """
    if parameters is None:
        parameters = model.initialise(seed, dtype)
    trainer = DataParallel(rank, model, optimiser, parameters, **options)
    shares = np.zeros(operator.index(steps))
    for step in range(len(shares)):
        x, y, divisor = batches(step, trainer.group)
        shares[step] = trainer.step(x, y, divisor, rate(step) if rate else None)
    # The shares of all steps are added up in one exchange at the end, not in one each step.
    return Training(parameters, all_reduce(trainer.group, shares, out=shares))
