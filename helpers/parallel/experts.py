"""Expert parallelism: each rank has some of the experts, and tokens travel to them and back.

Every rank has tokens of its own and its own share of the experts, as a rule along the data axis
(Lepikhin et al. 2020, "GShard", section 3.2). A mixture then needs two all-to-alls forward, tokens
there and answers back, and two backward. What travels is as much as the router decides, so each
rank first says how many rows it will send.

The router and all that is not an expert is on every rank: its gradient is summed over the ranks.
An expert is on one rank, where all of its tokens come: its gradient is complete there.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from helpers.engine.collectives import all_to_all
from helpers.nn.experts import Journey

COUNT_BYTES = 8
"""Of the number that says how many rows an expert will get."""


class ExpertJourney(Journey):
    """Tokens go to the ranks that have their experts, and answers come back.

    Parameters
    ----------
    group : Group
        The ranks that share the experts: rank r has the r-th of equal parts.
    counts : integer array of shape (experts,)
        How many of this rank's rows go to each expert.

    Attributes
    ----------
    counts : integer array of shape (experts here,)
        How many rows each of this rank's experts gets, from all ranks.

    Examples
    --------
    Each rank keeps one row and sends one to the other rank:

    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> def program(rank):
    ...     trip = ExpertJourney(rank.data, np.array([1, 1]))
    ...     return trip.there(np.full((2, 1), rank.index)).ravel().tolist()
    >>> spmd.run(None, Mesh(data=2), program).results
    [[0, 1], [0, 1]]
    """

    def __init__(self, group, counts):
        self.group = group
        here = experts_of(group, len(counts))
        counts = np.asarray(counts, np.int64).reshape(group.size, -1)
        come = np.stack(all_to_all(group, list(counts)))  # (source, expert)
        self._out, self._in = counts.sum(axis=1), come.sum(axis=1)
        super().__init__(come.sum(axis=0))
        # Rows come sorted by rank, then by expert; the experts want theirs together.
        expert = np.tile(np.arange(here.stop - here.start), group.size)
        self._order = np.argsort(np.repeat(expert, come.ravel()), kind="stable")

    def there(self, rows):
        """Rows, sorted by expert, to where their experts are."""
        return self._travel(rows, self._out)[self._order]

    def back(self, rows):
        """Rows, as `there` gave them, to where they came from."""
        as_they_came = np.empty_like(rows)
        as_they_came[self._order] = rows
        return self._travel(as_they_came, self._in)

    def _travel(self, rows, sizes):
        parts = np.split(rows, np.cumsum(sizes)[:-1])
        return np.concatenate(all_to_all(self.group, parts))


def journeys(group):
    """What `helpers.nn.experts.mixture` takes as its ``journey``, for the experts of a group."""
    return partial(ExpertJourney, group)


def experts_of(group, experts):
    """Which of all experts are this rank's: a slice.

    Raises
    ------
    ValueError
        If the experts do not split over the ranks.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> spmd.run(None, Mesh(data=2), lambda rank: experts_of(rank.data, 8)).results
    [slice(0, 4, None), slice(4, 8, None)]
    """
    if experts % group.size:
        most = max(experts // group.size, 1) * group.size
        raise ValueError(
            f"{experts} experts do not split over {group.size} ranks: take {most} or "
            f"{most + group.size} experts."
        )
    here = experts // group.size
    return slice(group.rank * here, (group.rank + 1) * here)


def cut(parameters, group):
    """This rank's part of a mixture: the whole router, and its own experts (views).

    Parameters
    ----------
    parameters : dict
        Arrays of the names and shapes of `helpers.nn.experts.expert_shapes`, all experts.
    group : Group

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        As for `experts_of`.
    """
    here = experts_of(group, parameters["router"].shape[1])
    return {name: a if name == "router" else a[here] for name, a in parameters.items()}


def predicted_bytes(counts, width, itemsize=8):
    """Bytes that each rank sends in a forward and a backward pass.

    A row that leaves its rank travels four times: there and back, forward and backward. The sender
    of the ways back is the rank that has the expert. Before, each rank tells the others how many
    rows will come.

    Parameters
    ----------
    counts : integer array of shape (ranks, experts)
        How many rows of each rank go to each expert (`Route.counts`).
    width : int
        Numbers of a row.
    itemsize : int
        Bytes of a number.

    Returns
    -------
    list of int
        By rank.

    Examples
    --------
    Of rank 0 two rows leave, of rank 1 none:

    >>> predicted_bytes([[5, 2], [0, 3]], width=10, itemsize=4)
    [168, 168]
    """
    counts = np.asarray(counts)
    ranks = len(counts)
    rows = counts.reshape(ranks, ranks, -1).sum(axis=2)  # (from, to)
    np.fill_diagonal(rows, 0)
    announced = (ranks - 1) * counts.shape[1] // ranks * COUNT_BYTES
    travelled = 2 * (rows.sum(axis=1) + rows.sum(axis=0)) * width * itemsize
    return (travelled + announced).tolist()
