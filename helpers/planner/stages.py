"""How the layers of a model are dealt out to stages, and what the activations of a stage take."""

from __future__ import annotations

import operator
from itertools import accumulate


def balance(costs, stages: int) -> list[int]:
    """Where to cut a model so that its slowest stage is as quick as it can be.

    Exact, by dynamic programming over the number of stages: the best way to cut the first j layers
    into k stages is the best place i for the last cut (Narayanan et al. 2019, "PipeDream", section
    3.1, without replicas).

    Parameters
    ----------
    costs : sequence of float
        Seconds of each layer, 0 or more.
    stages : int
        1 to the number of layers.

    Returns
    -------
    list of int
        ``stages + 1`` places, from 0 to the number of layers: stage s has the layers from place s
        up to, without, place s + 1. Of several best ways, the one with the earliest last cut.

    Raises
    ------
    ValueError
        The number of stages is impossible, or a cost is negative or not finite.

    Examples
    --------
    >>> balance([1, 1, 1, 1, 4], stages=2)
    [0, 4, 5]
    >>> balance([2, 1, 1, 2, 1, 1], stages=3)
    [0, 2, 4, 6]
    """
    costs = [float(cost) for cost in costs]
    if not all(0 <= cost < float("inf") for cost in costs):
        raise ValueError(f"costs must be finite numbers from 0 up, not {costs}.")
    if not 1 <= operator.index(stages) <= len(costs):
        raise ValueError(
            f"{len(costs)} layers do not make {stages} stages: take 1 to {len(costs)}."
        )
    before = [0.0, *accumulate(costs)]
    # slowest[j] is that of the best way for the first j layers; no way at all: infinite.
    slowest, cuts = [0.0] + [float("inf")] * len(costs), []
    for _ in range(stages):
        ways = [
            [(max(slowest[i], before[j] - before[i]), i) for i in range(j)] or [(float("inf"), 0)]
            for j in range(len(before))
        ]
        slowest, places = zip(*map(min, ways), strict=True)
        cuts.append(places)
    found = [len(costs)]
    for places in reversed(cuts):
        found.append(places[found[-1]])
    return found[::-1]
