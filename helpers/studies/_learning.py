"""What the studies of learning together have in common: rows, a network, and scores."""

from __future__ import annotations

import numpy as np

from helpers.datasets import load_table
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.learning.scores import scores
from helpers.nn import MLP

NETWORK = MLP((36, 64, 1))
DTYPE = np.float32
TEST_ROWS = 12_000
AIRLINES = ("UA", "B6", "EV", "DL", "AA", "MQ", "US", "9E")
"""The eight airlines with the most flights."""


class Flights:
    """The flights of the year to learn from, and a fixed sample of the held-out days.

    Parameters
    ----------
    task : str
        As for `helpers.datasets.load_table`.
    """

    def __init__(self, task="late"):
        table = load_table(task)
        self.train, self.test = table.train, table.test.sample(TEST_ROWS, seed=2013)
        self.hour = table.names.index("scheduled hour")

    def sample(self, n, seed):
        """Features and targets of so many rows to learn from, float32."""
        return floats(self.train.sample(n, seed))

    def parts(self, how, n, seed):
        """For each worker `n` rows of its own: a flight of its "airline", or of its "hour" s."""
        return self.parts_and_rest(how, n, 0, seed)[0]

    def parts_and_rest(self, how, n, m, seed):
        """The same, and `m` rows that none of the workers has."""
        order = np.random.default_rng([seed, 1]).permutation(len(self.train))
        keys = self.keys(self.train, how)[order]
        mine = [order[keys == key][:n] for key in np.unique(keys)[-8:]]
        rest = np.setdiff1d(order, np.concatenate(mine))
        public = np.random.default_rng([seed, 2]).choice(rest, m, replace=False)
        return [self.train.select(rows) for rows in mine], self.train.select(public)

    def keys(self, table, how):
        """Whose rows these are: the number of the airline (a small one: -1), or of the block."""
        if how == "airline":
            return np.array([AIRLINES.index(a) if a in AIRLINES else -1 for a in table.airline])
        edges = np.quantile(self.train.X[:, self.hour], [0.2, 0.4, 0.6, 0.8])
        return np.digitize(table.X[:, self.hour], edges)


def floats(table):
    """Features and targets of a table, float32."""
    return table.X.astype(DTYPE), table.y.astype(DTYPE)


def on_ranks(program, *args, ranks=None, each=None):
    """What a program returns on so many ranks, or on one for each of the parts."""
    ranks = len(each) if ranks is None else ranks
    return spmd.run(None, Mesh(data=ranks), program, *args, each=each).results


def mean_scores(y, predictions):
    """The means of several models' scores."""
    each = [scores(y, p) for p in predictions]
    return {name: float(np.mean([found[name] for found in each])) for name in each[0]}


def sends(numbers, times, values, size=None):
    """What one worker sends in a training, as three columns of a table.

    Parameters
    ----------
    numbers : int
        Of one message.
    times : int
        How often such a message is made.
    values : float
        All numbers that one worker sends, to all others; a mean of the workers.
    size : int, optional
        Bytes of a number. Default: those of the studies' float32.
    """
    size = np.dtype(DTYPE).itemsize if size is None else size
    return dict(numbers=int(numbers), times=int(times), kilobytes=float(values * size / 1000))
