"""How the layers of a model are dealt out to stages, and what the activations of a stage take."""

from __future__ import annotations

import operator
from dataclasses import replace
from itertools import accumulate

from helpers.planner.costs import Costs


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


def kept_numbers(
    width: int,
    length: int,
    heads: int,
    recompute: str = "none",
    tensor: int = 1,
    sequence: bool = False,
) -> int:
    """How many numbers a block of a GPT keeps for its backward pass, for each position.

    Of the two norms what they gave and their rows before scale and shift (4 widths), queries, keys
    and values (3), the mixed values (1), the perceptron's slope and what it gave (4 each); and the
    attention weights: one number for each head and each position of the text (Korthikanti et al.
    2022, "Reducing activation recomputation in large transformer models", section 4).

    Parameters
    ----------
    width, length, heads : int
        Of the model, and of the text.
    recompute : {"none", "selective", "full"}
        What is computed again: nothing, the attention weights, or the whole block from its input.
    tensor : int
        Ranks over which the block is cut. The norms, a quarter of what is kept of it, are on all.
    sequence : bool
        Sequence parallelism on these ranks: each has the norms of its own positions only.

    Raises
    ------
    ValueError
        There is no such way to recompute.

    Examples
    --------
    >>> [kept_numbers(64, 32, 4, recompute) for recompute in ("none", "selective", "full")]
    [1152, 1024, 64]
    """
    norms = 4 * width // (tensor if sequence else 1)
    cut = norms + 12 * width // tensor
    kept = {"none": cut + heads * length // tensor, "selective": cut, "full": norms // 4}
    if recompute not in kept:
        raise ValueError(f"recompute is {recompute!r}: choose one of {', '.join(kept)}.")
    return kept[recompute]


def activation_bytes(
    microbatches: int,
    blocks: int,
    positions: int,
    width: int,
    length: int,
    heads: int,
    recompute: str = "none",
    vocabulary: int = 0,
    itemsize: int = 8,
    tensor: int = 1,
    sequence: bool = False,
) -> int:
    """Bytes that a stage of a GPT keeps between forward and backward passes, at most.

    Parameters
    ----------
    microbatches : int
        Of how many it keeps the activations at most, see
        `helpers.planner.pipeline.peak_activations`.
    blocks : int
        Blocks of the stage.
    positions : int
        Positions of one micro-batch: its texts times their length.
    width, length, heads, recompute
        As for `kept_numbers`.
    vocabulary : int
        Tokens, where the stage has the head; else 0.
    itemsize : int
        Bytes of a number.
    tensor, sequence
        As for `kept_numbers`.

    Returns
    -------
    int
        Without the memory that one pass works in, whichever block and micro-batch it is at. With
        full recomputation that is a whole block.

    Examples
    --------
    >>> activation_bytes(4, blocks=2, positions=256, width=64, length=32, heads=4)
    18874368
    """
    cut = tensor, sequence
    block = kept_numbers(width, length, heads, recompute, *cut)
    head = 2 * width // (tensor if sequence else 1) + vocabulary // tensor if vocabulary else 0
    return microbatches * (blocks * block + head) * positions * itemsize


def with_recomputation(costs: Costs, seconds) -> Costs:
    """The costs when a backward pass first computes something again.

    Parameters
    ----------
    costs : Costs
    seconds : float or sequence of float
        What that takes, on all stages or on each: with full recomputation ``costs.forward``.

    Examples
    --------
    >>> with_recomputation(Costs(forward=(1.0, 2.0), backward=(2.0, 4.0)), (1.0, 2.0)).backward
    (3.0, 6.0)
    """

    def longer(each):
        both = each, seconds
        number = max(len(part) if hasattr(part, "__len__") else 1 for part in both)
        parts = [part if hasattr(part, "__len__") else (part,) * number for part in both]
        return tuple(map(sum, zip(*parts, strict=True)))

    back = None if costs.backward is None else longer(costs.backward)
    return replace(costs, backward=back, input=longer(costs.input))
