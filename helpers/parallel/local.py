"""Local SGD: every rank takes several steps alone, then all average their parameters.

With one step between averagings it is synchronous SGD. With H steps it exchanges 1/H of the bytes
(Stich 2019, "Local SGD converges fast and communicates little", algorithm 1; McMahan et al. 2017
call it federated averaging where the ranks' data differ).
"""

from __future__ import annotations

import operator

from helpers.parallel.shards import average_parameters, positive


def local_sgd(group, parameters, step, steps, every, rows=1):
    """Take steps alone, and average the parameters now and then, and at the end.

    Parameters
    ----------
    group : helpers.engine.groups.Group
        For example ``rank.data``.
    parameters : float array of shape (size,)
        Equal on all ranks at the beginning, and at the end; changed in place.
    step : callable
        ``step(number)`` changes this rank's parameters in place, by a batch of its own rows. The
        number counts from 0.
    steps : int
        How many steps each rank takes, 0 or more; the same on all ranks.
    every : int
        Steps from one averaging to the next, H in the papers: 1 or more.
    rows : int
        How much this rank counts in the mean, as the number of its rows. Default: all alike.

    Returns
    -------
    int
        How often the parameters were averaged: ``ceil(steps / every)``.

    Raises
    ------
    ValueError, TypeError
        A number is out of its range, or as for `helpers.parallel.shards.average_parameters`.

    Examples
    --------
    >>> import numpy as np
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> def program(rank):
    ...     w = np.zeros(1)
    ...     def step(number):
    ...         w[:] += rank.index
    ...     return local_sgd(rank.data, w, step, steps=10, every=4), w.round(6)
    >>> spmd.run(None, Mesh(data=3), program).results[0]
    (3, array([10.]))
    """
    positive("every", every)
    if operator.index(steps) < 0:
        raise ValueError(f"steps is {steps}: give 0 or more.")
    averagings = 0
    for number in range(steps):
        step(number)
        if (number + 1) % every == 0 or number + 1 == steps:
            average_parameters(group, parameters, rows, out=parameters)
            averagings += 1
    return averagings
