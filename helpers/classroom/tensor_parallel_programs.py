"""What the panel of notebook 05 runs on the ranks: a block, and the exchanges alone."""

from __future__ import annotations

import time
import timeit

import numpy as np

from helpers import nn
from helpers.engine.collectives import all_gather, all_reduce, reduce_scatter
from helpers.parallel import tensor

VOCABULARY, BATCH, LENGTH, HEADS = 40, 16, 32, 4
SIZES = (32_768, 131_072, 524_288)
KINDS = {False: tensor.TensorParallel, True: tensor.SequenceParallel}


def block_step(rank, width: int, sequence: bool, repeats: int = 4):
    """A block of a GPT in float32, forward and backward, on 16 texts of 32 positions.

    All exchanges are rings.

    Parameters
    ----------
    rank : Rank
        The block is cut over its tensor group of 1, 2 or 4 ranks.
    width : int
    sequence : bool
        Sequence parallelism.
    repeats : int
        Steps; each is recorded as "step".

    Returns
    -------
    seconds : float
        Of the quickest step.
    nbytes : int
        What this rank keeps of the forward pass.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> run = spmd.run(None, spmd.Mesh(tensor=2), block_step, 8, True)
    >>> [nbytes for _, nbytes in run.results]  # 4 bytes for 512 positions, 129 numbers each
    [264192, 264192]
    """
    group = rank.tensor
    gpt = nn.GPT(VOCABULARY, LENGTH, width, HEADS, layers=1)
    flat = tensor.cut(gpt, 1, gpt.initialise_layer(1, 0, np.float32), group.rank, group.size)
    mine = nn.named_views(flat, tensor.shapes(gpt, 1, group.size))
    gradient = {name: np.empty_like(array) for name, array in mine.items()}
    exchange, memory, scratch = KINDS[sequence](group, "ring"), nn.Memory("f4"), nn.Memory("f4")
    x = np.ones((BATCH, LENGTH, width), np.float32)[:, exchange.positions(LENGTH)].copy()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        with rank.record("step"):
            y, kept = nn.block(mine, x, HEADS // group.size, None, memory, exchange)
            nn.block_grad(mine, kept, y, gradient, None, scratch, exchange)
        found.append(time.perf_counter() - start)
    return min(found), sum(array.nbytes for half in kept for array in _arrays(half))


def _arrays(kept):
    """The arrays among some things, of which some are tuples of arrays."""
    for part in kept:
        if isinstance(part, np.ndarray):
            yield part
        elif isinstance(part, tuple):
            yield from _arrays(part)


def exchange_seconds(rank, sizes=SIZES, repeats: int = 10) -> dict:
    """Seconds of each exchange as a ring over the tensor group: a straight line in its bytes.

    Parameters
    ----------
    rank : Rank
    sizes : sequence of int
        Bytes of the whole array.
    repeats : int

    Returns
    -------
    dict of str to array
        ``{exchange: (seconds a byte, seconds)}``, for `numpy.polyval`.

    Examples
    --------
    >>> from helpers.engine import spmd
    >>> lines = spmd.run(None, spmd.Mesh(tensor=2), exchange_seconds).results[0]
    >>> sorted(lines), len(lines["all_reduce"])
    (['all_gather', 'all_reduce', 'reduce_scatter'], 2)
    """
    group, found = rank.tensor, {}
    for nbytes in sizes:
        whole = np.ones((group.size, nbytes // 4 // group.size), np.float32)
        calls = {
            "all_reduce": lambda whole=whole: all_reduce(group, whole, out=whole, algorithm="ring"),
            "reduce_scatter": lambda whole=whole: reduce_scatter(group, whole, algorithm="ring"),
            "all_gather": lambda whole=whole: all_gather(group, whole[:1], alike=False),
        }
        for name, call in calls.items():
            seconds = min(timeit.repeat(call, number=1, repeat=repeats))
            found.setdefault(name, []).append(seconds)
    return {name: np.polyfit(sizes, seconds, 1) for name, seconds in found.items()}
