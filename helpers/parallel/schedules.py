"""Pipeline schedules: in which order each rank works on which micro-batch.

A model is cut into stages, one after the other; a batch into micro-batches. A schedule gives each
rank a list of `Operation`, and knows of no engine: one executor runs it on real ranks, one
simulator predicts it, and the same operations are drawn.

With p ranks, m micro-batches, and v chunks of the model a rank, when a forward pass takes as long
as the input gradient and as the weight gradient, and exchanges take no time:

============  =======================  ===================================================
schedule      idle share of the time   activations that rank r keeps at most (of one chunk)
============  =======================  ===================================================
one_by_one    (p - 1) / p              1
gpipe         (p - 1) / (m + p - 1)    m
one_f_one_b   (p - 1) / (m + p - 1)    min(m, p - r)
interleaved   (p - 1) / (vm + p - 1)   min(vm, 2(p - r - 1) + (v - 1)p + 1)
zero_bubble   (p - 1) / (3m + p - 1)   min(m, p); the share where m is p or more
============  =======================  ===================================================

Sources: Huang et al. 2019, "GPipe" (gpipe); Narayanan et al. 2019, "PipeDream", 2021,
"Memory-efficient pipeline-parallel DNN training" (one_f_one_b, emptied after each batch), and
"Efficient large-scale language model training on GPU clusters using Megatron-LM", section 2.2
(interleaved); Qi et al. 2024, "Zero bubble pipeline parallelism", section 2 (ZB-H1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("forward", "backward", "input", "weight")


@dataclass(frozen=True)
class Operation:
    """What a rank does with one micro-batch on one of its chunks of the model.

    Attributes
    ----------
    kind : {"forward", "backward", "input", "weight"}
        "input" is the gradient that the stage before waits for, "weight" the one that nobody waits
        for; "backward" is both in one.
    microbatch : int
    chunk : int
        Which of the rank's chunks; 0 where it has one.
    """

    kind: str
    microbatch: int
    chunk: int = 0

    def __str__(self):
        of_chunk = f", chunk {self.chunk}" if self.chunk else ""
        return f"{self.kind} of micro-batch {self.microbatch}{of_chunk}"


def one_by_one(rank: int, ranks: int, microbatches: int) -> Iterator[Operation]:
    """Naive: one micro-batch goes all the way forward and back before the next one begins.

    Parameters
    ----------
    rank, ranks : int
        Which rank's list is asked for, and how many stages there are.
    microbatches : int

    Yields
    ------
    Operation

    Examples
    --------
    >>> [str(operation) for operation in one_by_one(0, ranks=2, microbatches=1)]
    ['forward of micro-batch 0', 'backward of micro-batch 0']
    """
    _check(rank, ranks, microbatches)
    for microbatch in range(microbatches):
        yield Operation("forward", microbatch)
        yield Operation("backward", microbatch)


def gpipe(rank: int, ranks: int, microbatches: int) -> Iterator[Operation]:
    """All micro-batches forward, then all back. Parameters as for `one_by_one`.

    Examples
    --------
    >>> [operation.kind[0] for operation in gpipe(0, ranks=2, microbatches=3)]
    ['f', 'f', 'f', 'b', 'b', 'b']
    """
    _check(rank, ranks, microbatches)
    for microbatch in range(microbatches):
        yield Operation("forward", microbatch)
    for microbatch in range(microbatches):
        yield Operation("backward", microbatch)


def one_f_one_b(rank: int, ranks: int, microbatches: int) -> Iterator[Operation]:
    """1F1B: after a few forward passes, one backward for each forward. As for `one_by_one`.

    Just as quick as `gpipe`, but a rank keeps the activations of at most as many micro-batches as
    there are stages from it to the end.

    Examples
    --------
    >>> [operation.kind[0] for operation in one_f_one_b(0, ranks=2, microbatches=3)]
    ['f', 'f', 'b', 'f', 'b', 'b']
    """
    _check(rank, ranks, microbatches)
    ahead = min(ranks - rank - 1, microbatches)
    for microbatch in range(ahead):
        yield Operation("forward", microbatch)
    for microbatch in range(microbatches):
        if microbatch + ahead < microbatches:
            yield Operation("forward", microbatch + ahead)
        yield Operation("backward", microbatch)


def interleaved(rank: int, ranks: int, microbatches: int, chunks: int = 2) -> Iterator[Operation]:
    """1F1B with several chunks a rank: chunk c of rank r is stage c * ranks + r of the model.

    The pipeline fills and empties in chunks, which are shorter than stages, so the bubble shrinks
    by their number; and more is sent. Micro-batches go in groups of `ranks` through the chunks.

    Parameters
    ----------
    rank, ranks, microbatches
        As for `one_by_one`; `microbatches` must be a multiple of `ranks`.
    chunks : int

    Examples
    --------
    >>> [str(operation) for operation in interleaved(1, 2, 2)][:3]
    ['forward of micro-batch 0', 'forward of micro-batch 1', 'forward of micro-batch 0, chunk 1']
    """
    _check(rank, ranks, microbatches)
    if chunks < 1:
        raise ValueError(f"chunks is {chunks}: a rank has 1 or more.")
    if microbatches % ranks and chunks > 1:
        below = microbatches // ranks * ranks
        raise ValueError(
            f"{microbatches} micro-batches do not go through {ranks} ranks in groups: "
            f"take {below or ranks} or {below + ranks}."
        )
    number = microbatches * chunks
    ahead = number if chunks == 1 else (ranks - rank - 1) * 2 + (chunks - 1) * ranks
    ahead = min(ranks - rank - 1 if chunks == 1 else ahead, number)
    forwards = [Operation("forward", *turn) for turn in _turns(ranks, microbatches, chunks)]
    backwards = [
        Operation("backward", microbatch, chunks - 1 - chunk)
        for microbatch, chunk in _turns(ranks, microbatches, chunks)
    ]
    yield from forwards[:ahead]
    for place, backward in enumerate(backwards):
        yield from forwards[place + ahead : place + ahead + 1]
        yield backward


def _turns(ranks, microbatches, chunks):
    """(micro-batch, chunk) in order: groups of micro-batches go through the chunks in turn."""
    group = ranks if chunks > 1 else microbatches
    for first in range(0, microbatches, group):
        for chunk in range(chunks):
            for microbatch in range(first, first + group):
                yield microbatch, chunk


def zero_bubble(rank: int, ranks: int, microbatches: int) -> Iterator[Operation]:
    """ZB-H1: the weight gradients, for which nobody waits, fill the gaps. As for `one_by_one`.

    The order is that of 1F1B, with the backward pass in two halves. A rank puts off as many weight
    gradients as there are ranks before it, so it keeps the activations of as many micro-batches as
    rank 0 does in 1F1B; between both halves also the gradients that the second one needs.

    Examples
    --------
    >>> "".join(operation.kind[0] for operation in zero_bubble(1, ranks=2, microbatches=3))
    'fifiwfiww'
    """
    _check(rank, ranks, microbatches)
    ahead = min(ranks - rank - 1, microbatches)
    for microbatch in range(ahead):
        yield Operation("forward", microbatch)
    for microbatch in range(microbatches):
        if microbatch + ahead < microbatches:
            yield Operation("forward", microbatch + ahead)
        yield Operation("input", microbatch)
        # Put off as many as there are ranks before this one: at the end, these wait for the input
        # gradients, which then arrive without a gap, and the weights fill what is left.
        if microbatch >= rank:
            yield Operation("weight", microbatch - rank)
    for microbatch in range(max(0, microbatches - rank), microbatches):
        yield Operation("weight", microbatch)


def plan(schedule, ranks: int, microbatches: int, **options) -> list[list[Operation]]:
    """The operations of all ranks.

    Parameters
    ----------
    schedule : callable
        ``schedule(rank, ranks, microbatches)``: one of this module, or your own.
    ranks, microbatches : int
    **options
        More arguments of the schedule, such as ``chunks``.

    Returns
    -------
    list of list of Operation
        By rank.

    Examples
    --------
    >>> [len(operations) for operations in plan(gpipe, ranks=2, microbatches=4)]
    [8, 8]
    """
    return [list(schedule(rank, ranks, microbatches, **options)) for rank in range(ranks)]


def _check(rank, ranks, microbatches):
    for name, number in (("ranks", ranks), ("microbatches", microbatches)):
        if isinstance(number, bool) or not hasattr(number, "__index__") or number < 1:
            raise ValueError(f"{name} must be a whole number from 1 up, not {number!r}.")
    if not 0 <= rank < ranks:
        raise ValueError(f"There is no rank {rank}: there are 0 to {ranks - 1}.")
