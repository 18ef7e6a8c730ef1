"""A simulator of pipeline schedules: operations and costs in, the events of a run out.

It knows nothing of Dask, and gives the same `Event` records as a measured run. The operations are
those of `helpers.parallel.schedules`; chunk c of rank r is stage ``c * ranks + r`` of the model.
Costs are given, or fitted to a measured run (`helpers.planner.costs`).
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from statistics import median

from helpers.engine.events import Event
from helpers.planner.costs import Costs, fit, needs
from helpers.planner.stages import activation_bytes, balance, kept_numbers, with_recomputation
from helpers.planner.timelines import (
    GIVES,
    bubble,
    operations_of,
    peak_activations,
    quickest_step,
    step_of,
    step_seconds,
    typical_step,
)

__all__ = [
    "GIVES",
    "Costs",
    "activation_bytes",
    "assemble",
    "balance",
    "bubble",
    "find_fault",
    "fit",
    "kept_numbers",
    "needs",
    "peak_activations",
    "quickest_step",
    "simulate",
    "step_of",
    "step_seconds",
    "typical_step",
    "with_recomputation",
]


def find_fault(plan, chunks: int = 1) -> str | None:
    """What is wrong with a schedule, in words; None when it can be run.

    Parameters
    ----------
    plan : list of list of Operation
        The operations of each rank, in its order.
    chunks : int
        How many chunks of the model a rank has.

    Returns
    -------
    str or None
        An operation is missing, there twice, or out of order; or ranks wait for each other.

    Examples
    --------
    >>> from helpers.parallel.schedules import Operation
    >>> find_fault([[Operation("backward", 0), Operation("forward", 0)]])
    'rank 0: backward of micro-batch 0 comes before its forward.'
    >>> find_fault([[Operation("forward", 0)]])
    'rank 0: micro-batch 0 has no backward.'
    """
    microbatches = 1 + max((op.microbatch for ops in plan for op in ops), default=-1)
    if not microbatches:
        return "There is no operation at all."
    for rank, operations in enumerate(plan):
        fault = _fault_of_rank(operations, microbatches, chunks)
        if fault:
            return f"rank {rank}: {fault}"
    _, stuck = _run(plan, chunks, Costs())
    if stuck:
        waiting = "; ".join(
            f"rank {rank} waits with its {operation} for {_words(missing, len(plan))}"
            for rank, operation, missing in stuck
        )
        return f"the ranks wait for each other: {waiting}."
    return None


def _fault_of_rank(operations, microbatches, chunks):
    place = {}
    for number, operation in enumerate(operations):
        if operation.kind not in GIVES:
            return f"there is no operation {operation.kind!r}: choose {', '.join(GIVES)}."
        if not (0 <= operation.chunk < chunks and operation.microbatch >= 0):
            return f"{operation} is of a chunk or micro-batch that does not exist."
        if operation in place:
            return f"{operation} is there twice."
        place[operation] = number
    at = {(op.kind, op.microbatch, op.chunk): number for op, number in place.items()}
    for microbatch in range(microbatches):
        for chunk in range(chunks):
            fault = _fault_of_microbatch(at, microbatch, chunk)
            if fault:
                return fault
    return None


def _fault_of_microbatch(at, microbatch, chunk):
    name = f"micro-batch {microbatch}" + (f", chunk {chunk}" if chunk else "")
    kinds = {kind: at.get((kind, microbatch, chunk)) for kind in GIVES}
    there = {kind for kind, place in kinds.items() if place is not None}
    if "forward" not in there:
        return f"{name} has no forward."
    if "backward" in there and there & {"input", "weight"}:
        return f"{name} has a backward and also a half of it: take the whole or the two halves."
    if there == {"forward"}:
        return f"{name} has no backward."
    for half, other in (("input", "weight"), ("weight", "input")):
        if half in there and other not in there:
            return f"{name} has the {half} half of its backward, and not the {other} half."
    order = ["forward", "backward"] if "backward" in there else ["forward", "input", "weight"]
    for first, second in pairwise(order):
        if kinds[second] < kinds[first]:
            return f"{second} of {name} comes before its {first}."
    return None


def _words(missing, ranks):
    what, microbatch, stage = missing
    return f"the {what} of micro-batch {microbatch} from stage {stage} (rank {stage % ranks})"


def simulate(plan, costs: Costs, chunks: int = 1) -> list[Event]:
    """The events of a run: when each rank works on what, and when it waits.

    A rank works through its list; an operation begins when the rank is free and what it needs has
    come. Messages travel while ranks compute.

    Parameters
    ----------
    plan, chunks
        As for `find_fault`.
    costs : Costs

    Returns
    -------
    list of Event
        In order of their start; `layer` is the stage. "wait" is waiting before an operation.

    Raises
    ------
    ValueError
        The schedule has a fault; the sentence is that of `find_fault`.

    Examples
    --------
    >>> from helpers.parallel.schedules import gpipe, plan
    >>> events = simulate(plan(gpipe, ranks=2, microbatches=1), Costs())
    >>> [(e.rank, e.operation, e.start) for e in events if e.operation != "wait"]
    [(0, 'forward', 0.0), (1, 'forward', 1.0), (1, 'backward', 2.0), (0, 'backward', 4.0)]
    """
    return _checked_run(plan, chunks, costs)


def assemble(plan, events, costs: Costs, chunks: int = 1) -> list[Event]:
    """The timeline of ranks that took turns, as it would be if each had a core of its own.

    Where there are more ranks than cores, a timeline that is measured as it is shows the sharing
    of the cores. So each operation is timed alone, while all other ranks wait; and the timeline is
    put together from these times in the order of the schedule. A message takes what `costs` say.

    Parameters
    ----------
    plan, chunks
        As for `find_fault`.
    events : list of Event
        Of the run in turns; of several steps the median of each operation counts.
    costs : Costs
        Of which only the message's time is used, see `fit`.

    Returns
    -------
    list of Event
        As from `simulate`.

    Raises
    ------
    ValueError
        The schedule has a fault, or one of its operations is not among the events.

    Examples
    --------
    >>> from helpers.parallel.schedules import gpipe, plan
    >>> in_turns = [Event(0, "forward", 0.0, 2.0, layer=0, microbatch=0),
    ...             Event(1, "forward", 5.0, 1.0, layer=1, microbatch=0),
    ...             Event(1, "backward", 7.0, 3.0, layer=1, microbatch=0),
    ...             Event(0, "backward", 11.0, 4.0, layer=0, microbatch=0)]
    >>> [e.start for e in assemble(plan(gpipe, 2, 1), in_turns, Costs()) if e.operation != "wait"]
    [0.0, 2.0, 3.0, 6.0]
    """
    lengths = defaultdict(list)
    for event in operations_of(events):
        lengths[event.operation, event.microbatch, event.layer].append(event.length)
    for rank, operations in enumerate(plan):
        for operation in operations:
            stage = operation.chunk * len(plan) + rank
            if (operation.kind, operation.microbatch, stage) not in lengths:
                raise ValueError(f"rank {rank}: {operation} is not among the events.")
    alone = {key: median(found) for key, found in lengths.items()}
    return _checked_run(plan, chunks, costs, alone)


def _checked_run(plan, chunks, costs, lengths=None):
    fault = find_fault(plan, chunks)
    if fault:
        raise ValueError(f"This schedule cannot be run: {fault}")
    events, _ = _run(plan, chunks, costs, lengths)
    return sorted(events, key=lambda event: (event.start, event.rank))


def _run(plan, chunks, costs, lengths=None):
    """The events, and where ranks are stuck: (rank, operation, what it waits for) for each.

    ``lengths`` has the seconds of each single operation; without it the costs say them.
    """
    ranks, last = len(plan), len(plan) * chunks - 1
    there, free, place, events = {}, [0.0] * ranks, [0] * ranks, []
    moved = True
    while moved:
        moved = False
        for rank, operations in enumerate(plan):
            while place[rank] < len(operations):
                operation = operations[place[rank]]
                stage = operation.chunk * ranks + rank
                needed = needs(operation, stage, last)
                if not all(need in there for need in needed):
                    break
                come = [_arrival(there[need], need[2], rank, ranks, costs) for need in needed]
                begin = max([free[rank], *come])
                if begin > free[rank]:
                    events.append(Event(rank, "wait", free[rank], begin - free[rank]))
                events.append(_event(operation, rank, stage, begin, costs, lengths))
                free[rank] = events[-1].stop
                there[GIVES[operation.kind], operation.microbatch, stage] = free[rank]
                place[rank] += 1
                moved = True
    return events, _stuck(plan, place, there, last)


def _event(operation, rank, stage, begin, costs, lengths):
    kind, microbatch = operation.kind, operation.microbatch
    length = lengths[kind, microbatch, stage] if lengths else costs.seconds(kind, stage)
    return Event(rank, kind, begin, length, costs.nbytes, stage, microbatch)


def _arrival(ready, stage, rank, ranks, costs):
    """When what a stage gave is on a rank: at once where the stage is its own."""
    return ready if stage % ranks == rank else ready + costs.transfer


def _stuck(plan, place, there, last):
    found = []
    for rank, operations in enumerate(plan):
        if place[rank] < len(operations):
            operation = operations[place[rank]]
            stage = operation.chunk * len(plan) + rank
            missing = next(need for need in needs(operation, stage, last) if need not in there)
            found.append((rank, operation, missing))
    return found
