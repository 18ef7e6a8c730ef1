"""What the operations of a pipeline cost: given by hand, or fitted to the events of a real run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from helpers.planner.timelines import GIVES, operations_of


@dataclass(frozen=True)
class Costs:
    """Seconds of each operation, and what it takes to send what it gives to the next stage.

    Attributes
    ----------
    forward, input, weight : float or sequence of float
        Seconds for one micro-batch on one stage; a sequence has one number for each stage.
    backward : float or sequence of float, optional
        Seconds of both halves in one. Default: as long as input and weight together.
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
    backward: float | tuple | None = None
    latency: float = 0.0
    byte_seconds: float = 0.0
    nbytes: int = 0

    def seconds(self, kind: str, stage: int) -> float:
        """How long an operation takes on a stage."""
        each = getattr(self, kind)
        if each is None:
            return self.seconds("input", stage) + self.seconds("weight", stage)
        return float(each[stage] if hasattr(each, "__len__") else each)

    @property
    def transfer(self) -> float:
        """How long a message takes."""
        return self.latency + self.byte_seconds * self.nbytes


def needs(operation, stage: int, last: int) -> list[tuple]:
    """What must be there before an operation can begin: (what, micro-batch, stage) for each.

    Parameters
    ----------
    operation : Operation or Event
        Its kind and its micro-batch count.
    stage, last : int
        The stage that it works on, and the last of all stages.

    Examples
    --------
    >>> from helpers.parallel.schedules import Operation
    >>> needs(Operation("backward", 3), stage=1, last=2)
    [('output', 3, 1), ('gradient', 3, 2)]
    """
    kind = getattr(operation, "kind", None) or operation.operation
    microbatch = operation.microbatch
    if kind == "forward":
        return [("output", microbatch, stage - 1)] if stage else []
    if kind == "weight":
        return [("gradient", microbatch, stage)]
    after = [("gradient", microbatch, stage + 1)] if stage < last else []
    return [("output", microbatch, stage), *after]


def fit(events, *more) -> Costs:
    """The costs that a measured run shows: medians, so that a hiccup counts little.

    Parameters
    ----------
    events : list of Event
        Of a run on ranks that each had a core, perhaps of several steps. An operation's `nbytes`
        are those of what it gave to another stage.
    *more : list of Event
        Further runs. A kind of operation that does not occur in the first one is taken from them.
        Where their messages have other sizes, the two parts of a message's time are told apart;
        else all of it is called latency.

    Returns
    -------
    Costs
        A kind of operation that did not occur at all has no time: it is not a number.

    Raises
    ------
    ValueError
        There is no operation among the events, or one of them is of no stage.

    Examples
    --------
    >>> from helpers.parallel.schedules import gpipe, plan
    >>> from helpers.planner.pipeline import simulate
    >>> true = Costs(forward=1.0, backward=3.0, latency=0.25, nbytes=8)
    >>> found = fit(simulate(plan(gpipe, ranks=2, microbatches=4), true))
    >>> found.forward, found.backward, found.latency, found.nbytes
    ((1.0, 1.0), (3.0, 3.0), 0.25, 8)
    """
    seconds = dict.fromkeys(GIVES)
    for kind in GIVES:
        for run in (events, *more):
            seconds[kind] = seconds[kind] or _by_stage(operations_of(run), kind)
        if seconds[kind] is None and kind != "backward":
            seconds[kind] = float("nan")
    points = [point for run in (events, *more) for point in message_times(run)]
    latency, byte_seconds = _line(points)
    sizes = [nbytes for nbytes, _ in message_times(events)]
    nbytes = round(median(sizes)) if sizes else 0
    return Costs(**seconds, latency=latency, byte_seconds=byte_seconds, nbytes=nbytes)


def _by_stage(work, kind):
    """Median seconds of a kind of operation on each stage; None where it did not occur at all."""
    stages = range(1 + max(event.layer for event in work))
    found = [[e.length for e in work if (e.operation, e.layer) == (kind, s)] for s in stages]
    if not any(found):
        return None
    return tuple(median(lengths) if lengths else float("nan") for lengths in found)


def message_times(events) -> list[tuple[int, float]]:
    """Bytes and seconds of the messages that somebody waited for.

    A message's time goes from the end of the operation that gave it to the start of the one that
    needed it. It can be seen only where the receiving rank had nothing else to do.

    Parameters
    ----------
    events : list of Event
        Measured or simulated. When a run has several steps, they are told apart by their order.

    Returns
    -------
    list of (int, float)
    """
    work = operations_of(events)
    last = max(event.layer for event in work)
    gave, seen, before, found = defaultdict(list), defaultdict(int), {}, []
    for event in work:
        if GIVES[event.operation] != "nothing":
            gave[GIVES[event.operation], event.microbatch, event.layer].append(event)
    for event in work:
        free = before.get(event.rank)
        before[event.rank] = event.stop
        step = seen[event.operation, event.microbatch, event.layer]
        seen[event.operation, event.microbatch, event.layer] += 1
        for need in needs(event, event.layer, last):
            giver = gave[need][step] if step < len(gave[need]) else None
            if giver is None or giver.rank == event.rank:
                continue
            if free is None or free <= giver.stop:
                found.append((giver.nbytes, event.start - giver.stop))
    return found


def _line(points):
    """α and β of a message: a line through (bytes, seconds), neither of them below 0."""
    sizes = defaultdict(list)
    for nbytes, seconds in points:
        sizes[nbytes].append(seconds)
    middles = {nbytes: median(seconds) for nbytes, seconds in sizes.items()}
    slopes = [(t - s) / (b - a) for (a, s), (b, t) in combinations(middles.items(), 2)]
    slope = max(0.0, median(slopes)) if slopes else 0.0
    at_zero = [seconds - slope * nbytes for nbytes, seconds in middles.items()]
    return max(0.0, median(at_zero)) if at_zero else 0.0, slope
