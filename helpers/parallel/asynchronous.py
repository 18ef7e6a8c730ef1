"""Asynchronous SGD: nobody waits for anybody, and gradients arrive late.

A parameter server holds the parameters. Each worker fetches them, computes a gradient, sends it,
and gets newer parameters. Meanwhile others have changed them: the *staleness* of a gradient is the
number of updates between the parameters that it was computed at and those that it changes
(Dean et al. 2012, "Large scale distributed deep networks", section 4.1).

Two repairs are here. A rate divided by 1 + staleness makes old gradients count less (Zhang et al.
2016, "Staleness-aware async-SGD for distributed deep learning", equation 6, with one added so
that a fresh gradient has the full rate). A bound holds back workers that are too far ahead of the
slowest one (Ho et al. 2013, "More effective distributed ML via a stale synchronous parallel
parameter server", section 2).
"""

from __future__ import annotations

import asyncio
import operator
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from helpers.engine import spmd
from helpers.engine.collectives import barrier
from helpers.engine.events import Event
from helpers.engine.mesh import Mesh

WAIT_SECONDS = 0.25
"""So long the server lets a worker wait for an answer. Then the worker asks again: a thread that
waits for ever could not be ended when another rank fails."""


@dataclass(frozen=True, eq=False)
class Report:
    """What a parameter server has seen.

    Attributes
    ----------
    parameters : numpy.ndarray, shape (size,)
        The parameters after the last update.
    staleness : numpy.ndarray of int, shape (updates,)
        For each update, how many others came between fetching and sending.
    workers : numpy.ndarray of int, shape (updates,)
        Whose gradient each update was.
    lead : int
        The most steps that any worker was ahead of the slowest one still at work.
    """

    parameters: np.ndarray
    staleness: np.ndarray
    workers: np.ndarray
    lead: int


class ParameterServer:
    """The parameters, and the rule by which gradients change them.

    As a Dask actor (``client.submit(ParameterServer, …, actor=True).result()``) it lives on one
    worker, and everybody calls its methods. All of them are coroutines: they run on that
    worker's event loop one at a time, so no two updates meet, and one that waits holds up nobody.

    Parameters
    ----------
    parameters : float array of shape (size,)
        Where training starts; copied.
    optimiser : SGD or Adam
        From `helpers.nn`.
    workers : int
        How many send gradients; they are numbered from 0.
    updates : int, optional
        After so many, training is over: later gradients are not used. Default: no end.
    bound : int, optional
        How many steps a worker may be ahead of the slowest; 0 is lockstep. Default: any number.
    damped : bool
        Divide the rate by 1 + staleness.

    Raises
    ------
    ValueError
        The number of workers or of updates or the bound is impossible.

    Examples
    --------
    >>> from helpers.nn import SGD
    >>> server = ParameterServer(np.zeros(1), SGD(rate=1.0), workers=2)
    >>> server.update(0, np.array([1.0]), version=0), server.update(1, np.array([1.0]), version=0)
    (0, 1)
    >>> server.parameters
    array([-2.])
    """

    def __init__(self, parameters, optimiser, workers, updates=None, bound=None, damped=False):
        check_counts(workers=(workers, 1), updates=(updates or 0, 0), bound=(bound or 0, 0))
        self.parameters, self.optimiser = np.array(parameters), optimiser
        self.state = optimiser.start(self.parameters.size, self.parameters.dtype)
        self.updates, self.bound, self.damped, self.lead = updates, bound, damped, 0
        self.done = [0] * workers  # steps of each worker
        self.log: list[tuple[int, int]] = []
        self.moved = asyncio.Event()

    @property
    def version(self) -> int:
        """The number of updates so far."""
        return len(self.log)

    @property
    def over(self) -> bool:
        """True when all updates have been made."""
        return self.updates is not None and self.version >= self.updates

    def update(self, worker: int, gradient, version: int) -> int:
        """Take one step with a gradient that was computed at an older version.

        Parameters
        ----------
        worker : int
            Whose it is.
        gradient : array of shape (size,)
            Of the dtype of the parameters.
        version : int
            The version of the parameters that it was computed at.

        Returns
        -------
        int
            Its staleness.

        Raises
        ------
        ValueError, TypeError
            There is no such worker or version, or the gradient does not fit the parameters.
        """
        self._check(worker, version)
        staleness = self.version - version
        rate = self.optimiser.rate / (1 + staleness) if self.damped else None
        # A rate that is too high shows in the parameters; a warning on a worker helps nobody.
        with np.errstate(over="ignore", invalid="ignore"):
            self.optimiser.step(self.parameters, gradient, self.state, rate=rate)
        self.log.append((staleness, worker))
        self.done[worker] += 1
        self.lead = max(self.lead, self.done[worker] - min(self.done))
        return staleness

    async def pull(self, worker: int):
        """The version and a copy of the parameters, as soon as this worker may go on.

        Returns
        -------
        tuple of (int, numpy.ndarray or None), or None
            No parameters: training is over. None: the worker may still not go on after
            `WAIT_SECONDS`, and should ask again.
        """
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not (self.over or self._may_go_on(worker)):
                    await self.moved.wait()
        except TimeoutError:
            return None
        return self.version, None if self.over else self.parameters.copy()

    async def push(self, worker: int, gradient, version: int):
        """`update`, unless training is over, then `pull`: one message there, one back."""
        if not self.over:
            self.update(worker, gradient, version)
            self.moved.set()  # wakes all who wait; the next ones wait for the next update
            self.moved = asyncio.Event()
        return await self.pull(worker)

    async def report(self) -> Report:
        """What the server has seen so far."""
        staleness, workers = np.array(self.log, int).reshape(-1, 2).T
        return Report(self.parameters.copy(), staleness, workers, self.lead)

    def _check(self, worker, version):
        if not 0 <= worker < len(self.done):
            raise ValueError(f"There is no worker {worker}: they are 0 to {len(self.done) - 1}.")
        if not 0 <= version <= self.version:
            raise ValueError(
                f"version {version} does not exist: the server has made {self.version} updates."
            )

    def _may_go_on(self, worker):
        return self.bound is None or self.done[worker] - min(self.done) <= self.bound


class ServedRun(NamedTuple):
    """What `train_asynchronously` and `train_with_backup` give.

    Attributes
    ----------
    report : Report or BackupReport
        What the server has seen.
    events : list of Event
        "gradient" is computing; "server" is sending, waiting and fetching.
    seconds : float
        From the first gradient's start to the last answer of the server.
    """

    report: Any
    events: list[Event]
    seconds: float


def train_asynchronously(
    client,
    start: Callable,
    parameters,
    optimiser,
    workers: int,
    updates: int,
    bound: int | None = None,
    damped: bool = False,
) -> ServedRun:
    """Train with a parameter server, which is a Dask actor, and workers that never meet.

    Parameters
    ----------
    client : distributed.Client
        The server and the workers live on its Dask workers, which may hold several of them.
    start : callable
        ``start(rank)`` is called once on each worker, to load its data. It returns a function
        ``gradient(parameters, step)``; `step` counts that worker's own steps.
    parameters : float array of shape (size,)
    optimiser : SGD or Adam
    workers, updates : int
        How many workers there are, and how many gradients they send in all. Fast workers send more.
    bound, damped
        As for `ParameterServer`.

    Returns
    -------
    ServedRun

    Raises
    ------
    ValueError
        A number is impossible.
    RankError
        A worker failed; all have ended then.
    """
    check_counts(workers=(workers, 1), updates=(updates, 0), bound=(bound or 0, 0))
    server = partial(ParameterServer, parameters, optimiser, workers, updates, bound, damped)
    return serve(client, server, start, workers)


def serve(client, make: Callable, start: Callable, workers: int) -> ServedRun:
    """Run a server as a Dask actor, and workers on ranks that talk to nobody but the server.

    Parameters
    ----------
    client : distributed.Client
    make : callable
        Makes the server: an object with `pull`, `push` and `report` as `ParameterServer` has them.
    start, workers
        As for `train_asynchronously`.
    """
    server = client.submit(make, actor=True, pure=False).result()
    # Inside the program, not as an argument: the engine unpacks a program where Dask knows which
    # worker it is on, and the handle of an actor must know that.
    program = partial(_work, server=server, start=start)
    run = spmd.run(client, Mesh(data=workers), program, record=True)
    events = [event for event in run.events if event.operation in ("gradient", "server")]
    begin = min((event.start for event in events), default=0.0)
    end = max((event.stop for event in events), default=0.0)
    events = [replace(event, start=event.start - begin) for event in events]
    return ServedRun(server.report().result(), events, end - begin)


def _work(rank, server, start):
    """The program of one worker."""
    gradient, step = start(rank), 0
    version, parameters = _answer(server, rank.index, server.pull(rank.index))
    barrier(rank.world)  # all begin at version 0: whoever loads slowly is not stale for that
    while parameters is not None:
        with rank.record("gradient"), np.errstate(over="ignore", invalid="ignore"):
            found = gradient(parameters, step)
        with rank.record("server", nbytes=found.nbytes):
            sent = server.push(rank.index, found, version)
            version, parameters = _answer(server, rank.index, sent)
        step += 1


def _answer(server, worker, asked):
    """The server's answer, once it gives one."""
    while (found := asked.result()) is None:
        asked = server.pull(worker)
    return found


# ---------------------------------------------------------------- without workers, to the last bit


def replay(gradient: Callable, parameters, optimiser, order: Iterable[int], damped=False) -> Report:
    """Asynchronous SGD in a given order: the same each time, to the last bit.

    Parameters
    ----------
    gradient : callable
        ``gradient(parameters, step)``, where `step` counts all updates.
    parameters, optimiser, damped
        As for `ParameterServer`.
    order : iterable of int
        Whose gradient arrives next. Each worker computes at the parameters that it got when its
        last gradient arrived; at first, at those of the start.

    Examples
    --------
    >>> from helpers.nn import SGD
    >>> slope = lambda parameters, step: 2 * parameters
    >>> replay(slope, np.array([1.0]), SGD(rate=0.1), order=[0, 0, 1, 0]).staleness.tolist()
    [0, 0, 2, 1]
    """
    order = [operator.index(worker) for worker in order]
    server = ParameterServer(parameters, optimiser, max(order, default=0) + 1, damped=damped)
    first = 0, server.parameters.copy()
    has = dict.fromkeys(order, first)
    for step, worker in enumerate(order):
        version, seen = has[worker]
        with np.errstate(over="ignore", invalid="ignore"):
            server.update(worker, gradient(seen, step), version)
        has[worker] = server.version, server.parameters.copy()
    staleness, workers = np.array(server.log, int).reshape(-1, 2).T
    return Report(server.parameters, staleness, workers, server.lead)


def stale_sgd(
    gradient: Callable, parameters, optimiser, steps: int, delay: int, damped: bool = False
) -> np.ndarray:
    """SGD whose every gradient is `delay` updates old; to study staleness alone.

    It is what ``delay + 1`` workers do that take turns. In the first steps, gradients are as old as
    they can be.

    Parameters
    ----------
    gradient : callable
        ``gradient(parameters, step)``.
    parameters : float array of shape (size,)
        Left as they are.
    optimiser : SGD or Adam
    steps, delay : int
        0 or more each.
    damped : bool
        Divide the rate by 1 + staleness.

    Returns
    -------
    numpy.ndarray, shape (size,)
        The parameters after the last step; NaN or infinite where training diverged.

    Raises
    ------
    ValueError
        `steps` or `delay` is no whole number from 0 up.

    Examples
    --------
    >>> from helpers.nn import SGD
    >>> slope = lambda parameters, step: 2 * parameters
    >>> [bool(abs(stale_sgd(slope, np.ones(1), SGD(rate=0.4), 40, d)) < 1) for d in (0, 1, 4)]
    [True, True, False]
    """
    check_counts(steps=(steps, 0), delay=(delay, 0))
    parameters = np.array(parameters)
    state = optimiser.start(parameters.size, parameters.dtype)
    past = deque([parameters.copy()], maxlen=delay + 1)
    for step in range(steps):
        rate = optimiser.rate / len(past) if damped else None
        with np.errstate(over="ignore", invalid="ignore"):
            optimiser.step(parameters, gradient(past[0], step), state, rate=rate)
        past.append(parameters.copy())
    return parameters


def check_counts(**numbers):
    """Raise unless each is a whole number, not below its least: ``name=(number, least)``."""
    for name, (number, least) in numbers.items():
        whole = hasattr(number, "__index__") and not isinstance(number, bool)
        if not whole or number < least:
            raise ValueError(f"{name} must be a whole number from {least} up, not {number!r}.")
