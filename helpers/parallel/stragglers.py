"""Stragglers: a step with all ranks takes as long as the slowest of them.

Two ways out are here, besides plain asynchrony. *Backup workers*: of n ranks the first n - b
gradients make the step, the others are dropped (Chen et al. 2016, "Revisiting distributed
synchronous SGD", section 3.2). *Bounded staleness*: fast ranks may be ahead by a few steps, not by
more (Ho et al. 2013, "More effective distributed ML via a stale synchronous parallel parameter
server", section 2). Both can be simulated from a table of seconds, and really run.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from helpers.engine.events import Event
from helpers.parallel.asynchronous import ParameterServer, ServedRun, check_counts, serve

# ---------------------------------------------------------------- simulated


class Schedule(NamedTuple):
    """What a simulation gives.

    Attributes
    ----------
    events : list of Event
        "gradient" is computing what is used, "dropped" what is not, "wait" is waiting.
    times : numpy.ndarray, shape (steps,)
        Seconds at which each step was complete.
    """

    events: list[Event]
    times: np.ndarray


def simulate_synchronous(seconds, backup: int = 0) -> Schedule:
    """Synchronous steps, each made of the gradients that come first.

    Parameters
    ----------
    seconds : array, shape (steps, ranks)
        How long each rank computes for each step.
    backup : int
        How many gradients a step does not wait for. A rank whose gradient comes too late begins at
        once with the step that the others are at.

    Raises
    ------
    ValueError
        `seconds` is no such table, or nobody is left to wait for.

    Examples
    --------
    >>> seconds = [[1.0, 1.0, 5.0]] * 4
    >>> simulate_synchronous(seconds).times.tolist()
    [5.0, 10.0, 15.0, 20.0]
    >>> simulate_synchronous(seconds, backup=1).times.tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    seconds = _checked(seconds)
    steps, ranks = seconds.shape
    check_backup(backup, ranks)
    at_work = [(seconds[0, rank], rank, 0, 0.0) for rank in range(ranks)] if steps else []
    heapq.heapify(at_work)
    events, times, here = [], [], []
    while len(times) < steps:
        now, rank, step, began = heapq.heappop(at_work)
        late = step < len(times)
        events.append(Event(rank, "dropped" if late else "gradient", began, now - began))
        free = [rank]
        if not late:
            here.append((rank, now))
            if len(here) < ranks - backup:
                continue
            times.append(now)
            events += [Event(r, "wait", came, now - came) for r, came in here if came < now]
            free, here = [r for r, _ in here], []
        for r in free if len(times) < steps else []:
            heapq.heappush(at_work, (now + seconds[len(times), r], r, len(times), now))
    events += [Event(r, "dropped", began, times[-1] - began) for _, r, _, began in at_work]
    return Schedule(sorted(events, key=lambda e: (e.start, e.rank)), np.array(times))


def simulate_bounded(seconds, bound: int | None = None) -> Schedule:
    """Steps of ranks that run ahead of each other by at most `bound`.

    Parameters
    ----------
    seconds : array, shape (steps, ranks)
        How long each rank computes for each step.
    bound : int, optional
        Steps that a rank may be ahead of the slowest; 0 is lockstep. Default: any number.

    Returns
    -------
    Schedule
        A step is complete when all ranks have done it.

    Raises
    ------
    ValueError
        `seconds` is no such table, or the bound is no whole number from 0 up.

    Examples
    --------
    >>> seconds = [[1.0, 3.0], [1.0, 1.0], [3.0, 1.0]]
    >>> [simulate_bounded(seconds, bound).times.tolist() for bound in (0, 1)]
    [[3.0, 4.0, 7.0], [3.0, 4.0, 6.0]]
    """
    seconds = _checked(seconds)
    check_counts(bound=(bound or 0, 0))
    steps, ranks = seconds.shape
    finish, events = np.zeros((steps, ranks)), []
    for step in range(steps):
        ready = finish[step - 1] if step else np.zeros(ranks)
        behind = step - 1 - (steps if bound is None else bound)
        begin = np.maximum(ready, finish[behind].max()) if behind >= 0 else ready
        finish[step] = begin + seconds[step]
        for rank in range(ranks):
            if begin[rank] > ready[rank]:
                wait = float(begin[rank] - ready[rank])
                events.append(Event(rank, "wait", float(ready[rank]), wait))
            length = float(seconds[step, rank])
            events.append(Event(rank, "gradient", float(begin[rank]), length))
    return Schedule(sorted(events, key=lambda e: (e.start, e.rank)), finish.max(axis=1))


# ---------------------------------------------------------------- really run


@dataclass(frozen=True, eq=False)
class BackupReport:
    """What a server with backup workers has seen.

    Attributes
    ----------
    parameters : numpy.ndarray, shape (size,)
        The parameters after the last step.
    used : numpy.ndarray of int, shape (steps, workers - backup)
        Whose gradients made each step.
    dropped : numpy.ndarray of int, shape (workers,)
        How many gradients of each worker came too late.
    """

    parameters: np.ndarray
    used: np.ndarray
    dropped: np.ndarray


class BackupServer(ParameterServer):
    """Takes a step with the mean of the first gradients; those that come later are dropped.

    Parameters
    ----------
    parameters, optimiser, workers
        As for `ParameterServer`.
    updates : int, optional
        After so many steps training is over.
    backup : int
        How many workers a step does not wait for.

    Raises
    ------
    ValueError
        A number is impossible.

    Examples
    --------
    >>> from helpers.nn import SGD
    >>> server = BackupServer(np.zeros(1), SGD(rate=1.0), workers=3, backup=1)
    >>> for worker in (2, 0, 1):
    ...     server.update(worker, np.array([worker + 1.0]), version=0)
    >>> server.parameters, server.dropped
    (array([-2.]), [0, 1, 0])
    """

    def __init__(self, parameters, optimiser, workers, updates=None, backup=0):
        super().__init__(parameters, optimiser, workers, updates)
        check_backup(backup, workers)
        self.needed = workers - backup
        self.here = {}  # worker -> its gradient for this step
        self.used, self.dropped = [], [0] * workers

    @property
    def version(self) -> int:
        """The number of steps so far."""
        return len(self.used)

    def update(self, worker: int, gradient, version: int) -> None:
        """Take one gradient; if it is the last one needed, take the step.

        Parameters and errors as for `ParameterServer.update`.
        """
        self._check(worker, version)
        if version < self.version:
            self.dropped[worker] += 1
            return
        self.here[worker] = gradient
        if len(self.here) < self.needed:
            return
        used = sorted(self.here)  # in one order, so that rounding does not depend on who was first
        mean = np.mean([self.here[number] for number in used], axis=0, dtype=self.parameters.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            self.optimiser.step(self.parameters, mean, self.state)
        self.used.append(used)
        self.here = {}

    async def report(self) -> BackupReport:
        """What the server has seen so far."""
        used = np.array(self.used, int).reshape(-1, self.needed)
        return BackupReport(self.parameters.copy(), used, np.array(self.dropped))

    def _may_go_on(self, worker):
        return worker not in self.here


def train_with_backup(
    client, start, parameters, optimiser, workers: int, steps: int, backup: int = 0
) -> ServedRun:
    """Synchronous SGD that does not wait for the last gradients of a step.

    Parameters
    ----------
    client, start, parameters, optimiser, workers
        As for `train_asynchronously`.
    steps : int
        How many steps are taken.
    backup : int
        How many workers a step does not wait for; 0 is plain synchronous SGD.

    Returns
    -------
    ServedRun
        With a `BackupReport`.

    Raises
    ------
    ValueError
        A number is impossible.
    RankError
        A worker failed; all have ended then.
    """
    check_counts(workers=(workers, 1), steps=(steps, 0))
    check_backup(backup, workers)
    server = partial(BackupServer, parameters, optimiser, workers, steps, backup)
    return serve(client, server, start, workers)


def check_backup(backup: int, ranks: int) -> None:
    """Raise unless there is a gradient to wait for when so many are not waited for."""
    check_counts(backup=(backup, 0))
    if backup >= ranks:
        raise ValueError(
            f"With backup={backup} of {ranks} ranks nobody is left to wait for: "
            f"give 0 to {ranks - 1}."
        )


def _checked(seconds):
    seconds = np.asarray(seconds, dtype=float)
    if seconds.ndim != 2 or not seconds.shape[1] or not np.all(np.isfinite(seconds)):
        raise ValueError(
            f"seconds has shape {seconds.shape}: give a table of finite numbers (steps, ranks)."
        )
    if np.any(seconds < 0):
        raise ValueError("seconds holds a negative time: give 0 or more.")
    return seconds
