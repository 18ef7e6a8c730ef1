"""A simulator of pipeline schedules: operations and costs in, the events of a run out.

It knows nothing of Dask, and gives the same `Event` records as a measured run. The operations are
those of `helpers.parallel.schedules`; chunk c of rank r is stage ``c * ranks + r`` of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from helpers.engine.events import Event

GIVES = {"forward": "output", "backward": "gradient", "input": "gradient", "weight": "nothing"}


@dataclass(frozen=True)
class Costs:
    """Seconds of each operation, and what it takes to send what it gives to the next stage.

    Attributes
    ----------
    forward, input, weight : float or sequence of float
        Seconds for one micro-batch on one stage; a sequence has one number for each stage. A
        "backward" takes as long as input and weight together.
    latency : float
        Seconds of a message, α.
    byte_seconds : float
        Seconds a byte, β.
    nbytes : int
        Bytes of a message: the activations of one micro-batch, and as many of their gradient.

    Examples
    --------
    >>> Costs(forward=0.25, input=0.25, weight=0.5).seconds("backward", stage=3)
    0.75
    """

    forward: float | tuple = 1.0
    input: float | tuple = 1.0
    weight: float | tuple = 1.0
    latency: float = 0.0
    byte_seconds: float = 0.0
    nbytes: int = 0

    def seconds(self, kind: str, stage: int) -> float:
        """How long an operation takes on a stage."""
        if kind == "backward":
            return self.seconds("input", stage) + self.seconds("weight", stage)
        each = getattr(self, kind)
        return float(each[stage] if hasattr(each, "__len__") else each)

    @property
    def transfer(self) -> float:
        """How long a message takes."""
        return self.latency + self.byte_seconds * self.nbytes


def needs(operation, stage: int, last: int) -> list[tuple]:
    """What must be there before an operation can begin: (what, micro-batch, stage) for each.

    Examples
    --------
    >>> from helpers.parallel.schedules import Operation
    >>> needs(Operation("backward", 3), stage=1, last=2)
    [('output', 3, 1), ('gradient', 3, 2)]
    """
    microbatch = operation.microbatch
    if operation.kind == "forward":
        return [("output", microbatch, stage - 1)] if stage else []
    if operation.kind == "weight":
        return [("gradient", microbatch, stage)]
    after = [("gradient", microbatch, stage + 1)] if stage < last else []
    return [("output", microbatch, stage), *after]


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
    _, stuck = _run(plan, Costs(), chunks)
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
    fault = find_fault(plan, chunks)
    if fault:
        raise ValueError(f"This schedule cannot be run: {fault}")
    return sorted(_run(plan, costs, chunks)[0], key=lambda event: (event.start, event.rank))


def _run(plan, costs, chunks):
    """The events, and where ranks are stuck: (rank, operation, what it waits for) for each."""
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
                length = costs.seconds(operation.kind, stage)
                if begin > free[rank]:
                    events.append(Event(rank, "wait", free[rank], begin - free[rank]))
                about = dict(nbytes=costs.nbytes, layer=stage, microbatch=operation.microbatch)
                events.append(Event(rank, operation.kind, begin, length, **about))
                there[GIVES[operation.kind], operation.microbatch, stage] = begin + length
                free[rank] = begin + length
                place[rank] += 1
                moved = True
    return events, _stuck(plan, place, there, last)


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


def bubble(events, ranks: int) -> float:
    """The share of the ranks' time in which they do not compute.

    Parameters
    ----------
    events : list of Event
        Measured or simulated; "wait" is not computing.
    ranks : int

    Returns
    -------
    float
        From 0 to 1, of the time from the first event to the end of the last.

    Examples
    --------
    >>> bubble([Event(0, "forward", 0, 1), Event(1, "forward", 1, 1)], ranks=2)
    0.5
    """
    work = [event for event in events if event.operation in GIVES]
    whole = max(e.stop for e in work) - min(e.start for e in work)
    return 1 - sum(e.length for e in work) / (ranks * whole)


def peak_activations(events, ranks: int) -> list[int]:
    """Of how many micro-batches (and chunks) each rank keeps activations at most.

    They are kept from the forward pass to the end of the backward pass, or of the weight gradient
    where the backward pass is in two halves.

    Parameters
    ----------
    events : list of Event
    ranks : int

    Returns
    -------
    list of int
        By rank.

    Examples
    --------
    >>> from helpers.parallel.schedules import gpipe, one_f_one_b, plan
    >>> [peak_activations(simulate(plan(s, 2, 4), Costs()), 2) for s in (gpipe, one_f_one_b)]
    [[4, 4], [2, 1]]
    """
    peaks = []
    for rank in range(ranks):
        mine = [event for event in events if event.rank == rank]
        begins = [(e.start, 1) for e in mine if e.operation == "forward"]
        ends = [(e.stop, -1) for e in mine if e.operation in ("backward", "weight")]
        held = most = 0
        for _, change in sorted([*begins, *ends]):  # at one moment, what ends goes first
            held += change
            most = max(most, held)
        peaks.append(most)
    return peaks
