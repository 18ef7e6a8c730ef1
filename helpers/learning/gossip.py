"""Gossip: ranks agree without a server, by talking to neighbours only.

In each round every rank replaces its numbers by a weighted mean of its own and its neighbours'.
With weights that are symmetric and sum to 1 the mean of all stays what it is. On a connected graph
the ranks' distance from it is multiplied each round by the second largest absolute value of an
eigenvalue, or by less. 1 minus that is the spectral gap: large for a complete graph, small for a
long ring. Here all ranks take part in every round, one round after the other; "randomized" gossip
wakes two neighbours at a time, in no common order.

Sources: Xiao and Boyd 2004, "Fast linear iterations for distributed averaging" (the mixing matrix
and its second eigenvalue); Xiao, Boyd and Lall 2005, "A scheme for robust distributed sensor fusion
based on average consensus" (Metropolis weights); Boyd, Ghosh, Prabhakar and Shah 2006, "Randomized
gossip algorithms" (pairs at random); Lian et al. 2017, "Can decentralized algorithms outperform
centralized algorithms?", algorithm 1 (D-PSGD).
"""

from __future__ import annotations

import operator

import numpy as np

__all__ = [
    "agree",
    "average_with",
    "graph",
    "learn_by_gossip",
    "mixing_weights",
    "second_eigenvalue",
]

GRAPHS = ("ring", "random", "complete")


def graph(kind, ranks, seed=0, degree=3):
    """Who talks to whom.

    Parameters
    ----------
    kind : {"ring", "random", "complete"}
        "random": a ring, and chords drawn at random until ranks have about `degree` neighbours.
    ranks : int
    seed, degree : int
        For "random".

    Returns
    -------
    array of bool, shape (ranks, ranks)
        Symmetric; nobody is its own neighbour.

    Raises
    ------
    ValueError
        If there is no such kind, or there are no ranks.

    Examples
    --------
    >>> graph("ring", 4).sum(axis=1).tolist(), graph("complete", 4).sum(axis=1).tolist()
    ([2, 2, 2, 2], [3, 3, 3, 3])
    """
    if kind not in GRAPHS:
        raise ValueError(f"there is no graph {kind!r}: choose {', '.join(GRAPHS)}.")
    if operator.index(ranks) < 1:
        raise ValueError(f"{ranks} ranks: give 1 or more.")
    if kind == "complete":
        return ~np.eye(ranks, dtype=bool)
    edges, places = np.zeros((ranks, ranks), bool), np.arange(ranks)
    edges[places, (places + 1) % ranks] = True
    edges |= edges.T
    np.fill_diagonal(edges, False)
    if kind == "random":
        pairs = np.random.default_rng(seed).permutation(np.argwhere(np.triu(~edges, 1)))
        for a, b in pairs:
            if max(edges[a].sum(), edges[b].sum()) < degree:
                edges[a, b] = edges[b, a] = True
    return edges


def mixing_weights(edges):
    """Symmetric weights whose rows sum to 1: ``1 / (1 + larger degree)`` for each edge.

    Parameters
    ----------
    edges : array of bool, shape (p, p)

    Returns
    -------
    array of shape (p, p)
        The rest of each row stands on the diagonal: the weight of a rank's own numbers.

    Raises
    ------
    ValueError
        If the graph is not symmetric.

    Examples
    --------
    >>> mixing_weights(graph("ring", 3)).round(2).tolist()[0]
    [0.33, 0.33, 0.33]
    """
    edges = np.array(edges, bool)
    if edges.ndim != 2 or not np.array_equal(edges, edges.T):
        raise ValueError("the graph is not symmetric: who is heard must also hear.")
    np.fill_diagonal(edges, False)
    degree = edges.sum(axis=1)
    weights = np.where(edges, 1 / (1 + np.maximum.outer(degree, degree)), 0.0)
    return weights + np.diag(1 - weights.sum(axis=1))


def second_eigenvalue(weights):
    """By how much a round shrinks the disagreement, at worst; 1 minus it is the spectral gap.

    Examples
    --------
    >>> round(second_eigenvalue(mixing_weights(graph("ring", 8))), 3)
    0.805
    >>> bool(second_eigenvalue(mixing_weights(graph("complete", 8))) < 1e-12)
    True
    """
    sizes = np.sort(np.abs(np.linalg.eigvalsh(weights)))
    return float(sizes[-2]) if len(sizes) > 1 else 0.0


def average_with(group, array, weights):
    """One round of gossip: this rank's new array. All ranks of the group call it together.

    Parameters
    ----------
    group : Group
    array : float array
        Of the same dtype and shape on all ranks.
    weights : array of shape (p, p)
        From `mixing_weights`. Ranks with weight 0 exchange nothing.

    Returns
    -------
    array
    """
    mine = weights[group.rank]
    neighbours = [n for n in range(group.size) if n != group.rank and mine[n]]
    for other in neighbours:
        group.post(array, other)
    mixed = array.dtype.type(mine[group.rank]) * array
    for other in neighbours:
        mixed += array.dtype.type(mine[other]) * group.receive(other)
    return mixed


def agree(group, array, weights, rounds):
    """Gossip for some rounds.

    Returns
    -------
    array of shape (rounds + 1, *array.shape)
        This rank's numbers before the first round, and after each.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> from helpers.engine.mesh import Mesh
    >>> weights = mixing_weights(graph("complete", 4))
    >>> def program(rank):
    ...     return agree(rank.world, np.array([float(rank.index)]), weights, 1)[-1]
    >>> [result.tolist() for result in spmd.run(None, Mesh(data=4), program).results]
    [[1.5], [1.5], [1.5], [1.5]]
    """
    found = [np.array(array)]
    for _ in range(operator.index(rounds)):
        found.append(average_with(group, found[-1], weights))
    return np.array(found)


def learn_by_gossip(group, parameters, gradient_of, weights, steps, rate):
    """Decentralised SGD (D-PSGD): mix with the neighbours, and take a step of one's own.

    Parameters
    ----------
    group : Group
    parameters : float array of shape (size,)
        The same on all ranks at the beginning.
    gradient_of : callable
        ``gradient_of(parameters, step)``, on a batch of this rank's rows.
    weights : array of shape (p, p)
    steps : int
    rate : float

    Returns
    -------
    array of shape (size,)
        This rank's parameters. They differ from rank to rank, by the last step above all, which
        nobody has averaged yet; so the mean of all ranks is usually taken.
    """
    for step in range(operator.index(steps)):
        gradient = gradient_of(parameters, step)
        parameters = average_with(group, parameters, weights)
        parameters -= parameters.dtype.type(rate) * gradient
    return parameters
