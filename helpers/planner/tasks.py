"""Independent tasks on workers, simulated: who runs which task when, and what dies with a worker.

The four ways to deal tasks out are those of every library: blocks that are fixed beforehand, one
queue for all, the same queue with the longest task first, and blocks of which idle workers steal.
Nothing here needs Dask; the events are those of a measured run, so one figure draws both.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count

import numpy as np

from helpers.engine.events import Event
from helpers.parallel.search import as_loss

POLICIES = ("static", "dynamic", "longest first", "stealing")
"""How tasks are dealt out.

static: each worker has a block of neighbours, as equal in number as can be. dynamic: whoever is
free takes the next task of one queue (list scheduling). longest first: the same, the longest tasks
stand in front. stealing: blocks, and a worker that has none left takes the last task of the fullest
block (after Blumofe and Leiserson 1999, "Scheduling multithreaded computations by work stealing";
there a thief chooses its victim at random)."""


def simulate(
    seconds: Sequence[float],
    workers: int,
    policy: str = "dynamic",
    *,
    overhead: float = 0.0,
    batch: int | str = 1,
    priorities: Sequence[float] | None = None,
    deaths: Iterable[tuple[float, int]] = (),
    restart: float | None = None,
) -> list[Event]:
    """The events of a run of independent tasks.

    Parameters
    ----------
    seconds : sequence of float
        How long each task takes.
    workers : int
    policy : str
        One of `POLICIES`.
    overhead : float
        Seconds that a worker needs for each batch before its first task.
    batch : int or "guided"
        How many tasks a worker takes at once; "guided": a share of those that wait, see
        `batch_size`. The results of a batch come together at its end.
    priorities : sequence of float, optional
        One a task; a higher one goes first. Equal ones keep the order of the policy.
    deaths : iterable of (float, int)
        Second and worker. What a worker has not delivered by then is run again, by anybody.
    restart : float, optional
        Seconds after which a dead worker is back. Default: never.

    Returns
    -------
    list of Event
        "task" (its number stands in ``microbatch``), "overhead", and "lost" for work that died with
        its worker. In order of their start.

    Raises
    ------
    ValueError
        An argument is impossible, or all workers died before the end.

    Examples
    --------
    >>> [(e.rank, e.microbatch, e.start) for e in simulate([3, 1, 1, 1], workers=2)]
    [(0, 0, 0.0), (1, 1, 0.0), (1, 2, 1.0), (1, 3, 2.0)]
    >>> seconds = [1, 1, 1, 3]
    >>> {policy: makespan(simulate(seconds, 2, policy)) for policy in POLICIES}
    {'static': 4.0, 'dynamic': 4.0, 'longest first': 3.0, 'stealing': 4.0}
    """
    seconds, priorities = _checked(seconds, workers, policy, overhead, priorities)
    batch_size(batch, 1, workers)
    deaths = list(deaths)
    for when, worker in deaths:
        if not (when >= 0 and 0 <= worker < workers):
            raise ValueError(f"A death is a second from 0 on and a worker below {workers}.")
    if restart is not None and not restart >= 0:
        raise ValueError(f"restart is {restart}: give seconds from 0 on, or None for never.")
    order = sorted(range(len(seconds)), key=lambda task: -priorities[task])  # sorted is stable
    if policy == "longest first":
        order.sort(key=lambda task: (-priorities[task], -seconds[task]))
    run = _Run(seconds, workers, overhead, batch, steals=policy == "stealing")
    if policy in ("static", "stealing"):
        for worker, block in enumerate(np.array_split(np.array(order, int), workers)):
            run.own[worker].extend(block.tolist())
    else:
        run.shared.extend(order)
    return run.until_the_end(deaths, restart)


class _Run:
    """The state of a simulation. Of each worker: its block, its batch, how often it has died."""

    def __init__(self, seconds, workers, overhead, batch, steals):
        self.seconds, self.overhead = seconds, overhead
        self.batch, self.steals = batch, steals
        self.shared = deque()
        self.own = [deque() for _ in range(workers)]
        self.at_work = [None] * workers  # (start, tasks) of the batch that runs
        self.life = [0] * workers
        self.alive, self.idle = set(range(workers)), set(range(workers))
        self.events, self.left = [], len(seconds)
        self.agenda, self.number, self.now = [], count(), 0.0

    def until_the_end(self, deaths, restart):
        for when, worker in deaths:
            self._plan(when, "death", worker)
        while True:
            self._wake_the_idle()
            if not self.left:
                break
            if not self.agenda:
                raise ValueError(f"All workers died, and {self.left} tasks were never done.")
            self.now, _, what, worker, life = heapq.heappop(self.agenda)
            if what == "death" and worker in self.alive:
                self._die(worker, restart)
            elif what == "return":
                self.alive.add(worker)
                self.idle.add(worker)
            elif what == "done" and life == self.life[worker]:
                self._deliver(worker)
        return sorted(self.events, key=lambda event: (event.start, event.rank))

    def _plan(self, when, what, worker):
        # At one moment a batch is delivered before its worker dies.
        rank = {"done": 0, "return": 1, "death": 2}[what]
        key = (rank, next(self.number))
        heapq.heappush(self.agenda, (float(when), key, what, worker, self.life[worker]))

    def _wake_the_idle(self):
        for worker in sorted(self.idle):
            tasks = self._take(worker)
            if tasks:
                self.idle.discard(worker)
                self.at_work[worker] = self.now, tasks
                length = self.overhead + sum(self.seconds[task] for task in tasks)
                self._plan(self.now + length, "done", worker)

    def _take(self, worker):
        source, last_first = self.own[worker] or self.shared, False
        if not source and self.steals:
            source, last_first = max(self.own, key=len), True
        size = batch_size(self.batch, len(source), len(self.own)) if source else 0
        take = source.pop if last_first else source.popleft
        return [take() for _ in range(min(size, len(source)))]

    def _deliver(self, worker):
        start, tasks = self.at_work[worker]
        self.at_work[worker] = None
        if self.overhead:
            self.events.append(Event(worker, "overhead", start, self.overhead))
        start += self.overhead
        for task in tasks:
            length = float(self.seconds[task])
            self.events.append(Event(worker, "task", start, length, microbatch=task))
            start += length
        self.left -= len(tasks)
        self.idle.add(worker)

    def _die(self, worker, restart):
        self.life[worker] += 1
        self.alive.discard(worker)
        self.idle.discard(worker)
        again = list(self.own[worker])
        self.own[worker].clear()
        if self.at_work[worker] is not None:
            start, tasks = self.at_work[worker]
            self.at_work[worker] = None
            self.events.append(Event(worker, "lost", start, self.now - start))
            again = tasks + again
        self.shared.extendleft(reversed(again))
        if restart is not None:
            self._plan(self.now + restart, "return", worker)


def batch_size(batch: int | str, waiting: int, workers: int) -> int:
    """How many of the waiting tasks a worker takes at once.

    Parameters
    ----------
    batch : int or "guided"
        A number, or half of what is a worker's fair share of the rest: large batches first, single
        tasks at the end (guided self-scheduling, Polychronopoulos and Kuck 1987; with half of its
        size, so that the first batch is not the last to end).
    waiting, workers : int

    Raises
    ------
    ValueError
        `batch` is neither a whole number from 1 on nor "guided".

    Examples
    --------
    >>> batch_size(8, 100, 2), batch_size("guided", 100, 2), batch_size("guided", 3, 2)
    (8, 25, 1)
    """
    if batch == "guided":
        return max(1, math.ceil(waiting / (2 * workers)))
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f'batch is {batch!r}: give a whole number from 1 on, or "guided".')
    return batch


def makespan(events: Iterable[Event]) -> float:
    """Seconds from 0 to the end of the last event.

    Examples
    --------
    >>> makespan(simulate([2.0, 1.0, 1.0], workers=2))
    2.0
    """
    return max((event.stop for event in events), default=0.0)


def shortest_makespan(seconds: Sequence[float], workers: int) -> float:
    """What no schedule can undercut: the workers' fair share, and the longest task.

    With list scheduling the makespan is at most 2 - 1/m times the best possible on m workers, with
    the longest first at most 4/3 - 1/(3 m) times (Graham 1969, "Bounds on multiprocessing timing
    anomalies", theorems 1 and 2).

    Examples
    --------
    >>> shortest_makespan([3, 1, 1, 1], workers=2), shortest_makespan([5, 1], workers=2)
    (3.0, 5.0)
    """
    return float(max(sum(seconds) / workers, max(seconds, default=0)))


def simulate_search(
    search, trial: Callable, workers: int, overhead: float = 0.0
) -> tuple[list, list[Event]]:
    """A search for hyper-parameters on simulated workers.

    Parameters
    ----------
    search : generator
        From `helpers.parallel.search`.
    trial : callable
        ``trial(job)`` gives the loss and the seconds of a job.
    workers : int
    overhead : float
        Seconds added to each job.

    Returns
    -------
    results : list of (float, Job, float)
        When each result came, its job and its loss; in order of time.
    events : list of Event
        "task" for each job; ``microbatch`` is the number of the trial.

    Raises
    ------
    RuntimeError
        The search waits for a result although nothing runs.

    Examples
    --------
    >>> from helpers.parallel.search import random_search
    >>> search = random_search(["a", "b", "c"], budget=10)
    >>> results, events = simulate_search(search, lambda job: (0.5, 2.0), workers=2)
    >>> [(when, job.trial) for when, job, loss in results]
    [(2.0, 0), (2.0, 1), (4.0, 2)]
    """
    free, running, came = list(range(workers)), [], []
    results, events, now, number = [], [], 0.0, count()
    ended = False
    while True:
        while free and not ended:
            try:
                # A generator that has not begun takes nothing.
                job = search.send(came) if results or events else next(search)
            except StopIteration:
                ended = True
                break
            came = []
            if job is None:
                break
            worker = free.pop(0)
            loss, length = trial(job)
            loss = as_loss(loss)
            events.append(Event(worker, "task", now, length + overhead, microbatch=job.trial))
            heapq.heappush(running, (events[-1].stop, next(number), worker, job, loss))
        if not running:
            if ended:
                return results, events
            raise RuntimeError("The search waits for a result, but nothing runs.")
        now, _, worker, job, loss = heapq.heappop(running)
        free = sorted([*free, worker])
        results.append((now, job, loss))
        came.append((job, loss))


def _checked(seconds, workers, policy, overhead, priorities):
    seconds = [float(length) for length in seconds]
    if not all(0 <= length < math.inf for length in seconds):
        raise ValueError("A task takes a finite number of seconds, 0 or more.")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers is {workers!r}: give a whole number from 1 on.")
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}: choose one of {', '.join(POLICIES)}.")
    if not 0 <= overhead < math.inf:
        raise ValueError(f"overhead is {overhead}: give seconds, 0 or more.")
    priorities = [0] * len(seconds) if priorities is None else list(priorities)
    if len(priorities) != len(seconds):
        raise ValueError(f"{len(priorities)} priorities for {len(seconds)} tasks: give one each.")
    return seconds, priorities
