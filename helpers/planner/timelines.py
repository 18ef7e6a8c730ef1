"""What a timeline of a pipeline shows: its steps, how long they take, who is idle, what is kept."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

from helpers.engine.events import Event

GIVES = {"forward": "output", "backward": "gradient", "input": "gradient", "weight": "nothing"}
"""The operations of a schedule, and what each gives to another stage."""


def operations_of(events) -> list:
    """The events that are operations of a schedule, in order of their start.

    Raises
    ------
    ValueError
        There is none, or one says not which stage or which micro-batch it was.
    """
    work = sorted((e for e in events if e.operation in GIVES), key=lambda e: e.start)
    if not work:
        raise ValueError(f"No event is an operation of a schedule: {', '.join(GIVES)}.")
    for event in work:
        if event.layer is None or event.microbatch is None:
            raise ValueError(
                f"{event.operation} at {event.start:g} s has no stage or no micro-batch: record "
                "it with layer and microbatch."
            )
    return work


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
    >>> bubble([Event(0, "forward", 0, 1, 0, 0, 0), Event(1, "forward", 1, 1, 0, 1, 0)], ranks=2)
    0.5
    """
    work = operations_of(events)
    return 1 - sum(e.length for e in work) / (ranks * step_seconds(events))


def step_of(events, number: int = -1) -> list[Event]:
    """One step of a measured run of several: its operations, and what happened meanwhile.

    Parameters
    ----------
    events : list of Event
        Of steps that all have the same operations.
    number : int
        Which step; default: the last.

    Returns
    -------
    list of Event
        Time 0 is when its first operation began. Events that are no operations, such as waiting,
        are cut to the time from there to their rank's last operation.

    Examples
    --------
    >>> twice = [Event(0, "forward", start, 1, 0, 0, 0) for start in (3, 7)]
    >>> [(e.start, e.length) for e in step_of(twice, 0)], len(step_of(twice))
    ([(0, 1)], 1)
    """
    found = defaultdict(list)
    for event in operations_of(events):
        found[event.rank, event.operation, event.layer, event.microbatch].append(event)
    step = [times[number] for times in found.values()]
    zero = min(event.start for event in step)
    until = defaultdict(lambda: zero)
    for event in step:
        until[event.rank] = max(until[event.rank], event.stop)
    other = []
    for event in (e for e in events if e.operation not in GIVES):
        start, stop = max(event.start, zero), min(event.stop, until[event.rank])
        if start < stop:
            other.append(replace(event, start=start, length=stop - start))
    whole = [replace(event, start=event.start - zero) for event in (*step, *other)]
    return sorted(whole, key=lambda event: (event.start, event.rank))


def typical_step(events, warm_up: int = 1) -> list[Event]:
    """Of the steps of a run the one of middle length.

    Parameters
    ----------
    events : list of Event
        As for `step_of`.
    warm_up : int
        So many steps at the beginning do not count.

    Raises
    ------
    ValueError
        There are no more steps than that.

    Examples
    --------
    >>> lengths = enumerate((8, 3, 2, 7))  # the first one is left out
    >>> typical_step([Event(0, "forward", 9 * n, s, 0, 0, 0) for n, s in lengths])[0].length
    3
    """
    steps = _steps(events, warm_up)
    return steps[len(steps) // 2]


def quickest_step(events, warm_up: int = 1) -> list[Event]:
    """Of the steps of a run the shortest: what else a machine does can only make a step longer.

    Parameters and errors as for `typical_step`.

    Examples
    --------
    >>> lengths = enumerate((1, 3, 2, 7))  # the first one is left out
    >>> quickest_step([Event(0, "forward", 9 * n, s, 0, 0, 0) for n, s in lengths])[0].length
    2
    """
    return _steps(events, warm_up)[0]


def _steps(events, warm_up):
    """The steps after the warm-up, the shortest first."""
    times = Counter((e.operation, e.layer, e.microbatch) for e in operations_of(events))
    steps = [step_of(events, number) for number in range(warm_up, max(times.values()))]
    if not steps:
        raise ValueError(f"There is no step after {warm_up} of warm-up: take more steps.")
    return sorted(steps, key=step_seconds)


def step_seconds(events) -> float:
    """Seconds from the first operation's start to the last one's end.

    Examples
    --------
    >>> step_seconds([Event(0, "forward", 2, 1, 0, 0, 0), Event(1, "forward", 3, 1, 0, 1, 0)])
    2
    """
    work = operations_of(events)
    return max(e.stop for e in work) - min(e.start for e in work)


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
    >>> from helpers.planner.pipeline import Costs, simulate
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
