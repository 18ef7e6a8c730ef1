"""Independent tasks on Dask workers: results as they come, each of them once.

Dask places tasks, watches workers and runs again what a dead one had. Added here is what a search
needs besides: data that is placed once, batches for short tasks, tasks that fail or hang, and a
next task that depends on results (`helpers.parallel.search`).
"""

from __future__ import annotations

import os
import queue
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import NamedTuple

import cloudpickle

from helpers.parallel.ledger import Done, Ledger
from helpers.parallel.search import Job, as_loss

AHEAD = 3
"""Batches that are on their way for each worker: one runs, one lies ready, one waits its turn."""
LOOK_SECONDS = 0.5
"""How often lost data and hanging tasks are looked for, at least."""


class Result(NamedTuple):
    """The result of one job of a search.

    Attributes
    ----------
    job : helpers.parallel.search.Job
    loss : float
        Infinity when the training diverged or failed.
    error : str or None
        Why it failed.
    seconds : float
        How long it ran on its worker.
    """

    job: Job
    loss: float
    error: str | None
    seconds: float


def run_tasks(
    client,
    function: Callable,
    items: Iterable,
    shared=None,
    *,
    priorities: Iterable[float] | None = None,
    batch: int | str = 1,
    retries: int = 2,
    limit: float | None = None,
    ahead: int = AHEAD,
) -> Iterator[Done]:
    """Call a function for each item on the workers, and give the results as they come.

    Parameters
    ----------
    client : distributed.Client
    function : callable
        ``function(item)``, or ``function(item, shared)`` if something is shared.
    items : iterable
        What the number n of a `Done` counts. The first items start first.
    shared : object, optional
        Sent to every worker once, however many tasks there are.
    priorities : iterable of float, optional
        One an item; a higher one starts before a lower one.
    batch : int or "guided"
        How many items are one task for Dask; "guided": many at first, then fewer and fewer.
    retries : int
        How often an item may fail and is tried again.
    limit : float, optional
        Seconds after which an item counts as hanging: its worker is started anew, and the item has
        failed once. Default: never.
    ahead : int
        Batches that are on their way for each worker.

    Yields
    ------
    Done
        One for each item. Whoever stops before the end calls off what has not begun.

    Raises
    ------
    ValueError
        A number is impossible.

    Examples
    --------
    >>> for done in run_tasks(client, train, configs, shared=(X, y)):  # doctest: +SKIP
    ...     print(done.number, done.value)
    """
    with _Workers(client, function, shared, batch, retries, limit, ahead) as workers:
        for number, (item, priority) in enumerate(zip(items, priorities or repeat(0))):
            workers.ledger.add(number, (item,), priority)
        yield from workers.results()


def run_search(
    client,
    search: Iterator,
    train: Callable,
    shared=None,
    *,
    retries: int = 2,
    limit: float | None = None,
    ahead: int = 1,
) -> Iterator[Result]:
    """Run a search on the workers, and give the results as they come.

    Parameters
    ----------
    client : distributed.Client
    search : generator
        From `helpers.parallel.search`.
    train : callable
        ``train(config, budget)``, or ``train(config, budget, shared)`` if something is shared;
        returns the loss.
    shared, retries, limit
        As for `run_tasks`.
    ahead : int
        Jobs on their way for each worker. More keep workers busy, with decisions of older results.

    Yields
    ------
    Result

    Raises
    ------
    RuntimeError
        The search waits for a result although nothing runs.

    Examples
    --------
    >>> search = asha(configs, least=1000, most=27000)  # doctest: +SKIP
    >>> results = list(run_search(client, search, train, shared=(X, y)))  # doctest: +SKIP
    """
    with _Workers(client, train, shared, 1, retries, limit, ahead) as workers:
        asked, jobs = _Asked(search), {}
        while True:
            while len(workers.ledger) < workers.places() and (job := asked.next()) is not None:
                jobs[job.trial, job.budget] = job
                workers.ledger.add((job.trial, job.budget), (job.config, job.budget))
            if not len(workers.ledger):
                if asked.ended:
                    return
                raise RuntimeError("The search waits for a result, but nothing runs.")
            for done in workers.wait():
                loss = as_loss(float("nan") if done.error else done.value)
                job = jobs.pop(done.number)
                asked.came.append((job, loss))
                yield Result(job, loss, done.error, done.seconds)


class _Asked:
    """A search, and the results that it has not been told."""

    def __init__(self, search):
        self.search, self.came = search, []
        self.begun = self.ended = False

    def next(self) -> Job | None:
        """Its next job; None if it waits for results or wants no more."""
        if self.ended:
            return None
        try:
            job = self.search.send(self.came) if self.begun else next(self.search)
        except StopIteration:
            self.ended, job = True, None
        self.begun, self.came = True, []
        return job


class _Workers:
    """Batches of a ledger on Dask workers."""

    def __init__(self, client, function, shared, batch, retries, limit, ahead):
        if limit is not None and not limit > 0:
            raise ValueError(f"limit is {limit}: give seconds above 0, or None.")
        if not ahead >= 1:
            raise ValueError(f"ahead is {ahead}: give a whole number from 1 on.")
        self.client, self.function, self.limit, self.ahead = client, function, limit, ahead
        self.ledger = Ledger(retries, batch)
        self.shared, self.placed = shared, None
        self.futures = {}  # ticket -> future
        self.ended = queue.SimpleQueue()  # tickets of futures that are over, in any way
        self.name, self.looked = f"task-{uuid.uuid4().hex}", time.monotonic()

    def __enter__(self):
        self._count_workers()
        self._place()
        return self

    def __exit__(self, *exc_info):
        if self.futures:
            self.client.cancel(list(self.futures.values()), force=True)
        self.futures.clear()
        self.placed = None

    def results(self) -> Iterator[Done]:
        """All that come until no task is left."""
        while len(self.ledger):
            yield from self.wait()

    def places(self) -> int:
        """How many batches may be on their way."""
        return self.ahead * self.workers

    def wait(self) -> list[Done]:
        """Deal out what waits, then wait until something has come; maybe nothing of use."""
        self._deal_out()
        look = LOOK_SECONDS if self.limit is None else min(LOOK_SECONDS, self.limit / 4)
        tickets = self._tickets(look)
        over = self._collect(tickets) if tickets else []
        if time.monotonic() - self.looked > look:
            over += self._look_after()
            self.looked = time.monotonic()
        return over

    def _count_workers(self):
        in_use = getattr(self.client, "in_use", None)
        self.workers = max(1, len(in_use or self.client.nthreads()))

    def _place(self):
        if self.shared is not None:
            # In a list: of a tuple Dask would make one future for each of its parts.
            [self.placed] = self.client.scatter([self.shared], broadcast=True, hash=False)

    def _deal_out(self):
        if not self.ledger.waiting:
            return
        while len(self.futures) < self.places() and (batch := self.ledger.take(self.workers)):
            ticket, arguments = batch
            # All keys have one stem: to Dask they are a group, which it queues and never stacks up
            # on one worker.
            future = self.client.submit(
                _call, self.function, arguments, self.placed, key=(self.name, ticket)
            )
            self.futures[ticket] = future
            future.add_done_callback(lambda _, ticket=ticket: self.ended.put(ticket))

    def _tickets(self, seconds):
        """Tickets of what has ended, waiting for the first so long."""
        try:
            found = [self.ended.get(timeout=seconds)]
        except queue.Empty:
            return []
        while True:
            try:
                found.append(self.ended.get_nowait())
            except queue.Empty:
                return [ticket for ticket in dict.fromkeys(found) if ticket in self.futures]

    def _collect(self, tickets):
        """Fetch results at once: no later death of a worker can take them."""
        futures = {ticket: self.futures.pop(ticket) for ticket in tickets}
        good = {t: future for t, future in futures.items() if future.status == "finished"}
        values = self.client.gather(good, errors="skip") if good else {}
        over = []
        for ticket, future in futures.items():
            if values.get(ticket) is not None:
                over += self.ledger.settle(ticket, map(_unpacked, values[ticket]))
            elif future.status == "error":  # its workers died, again and again
                over += self.ledger.blame(ticket, _words(future.exception()))
            else:
                self.ledger.give_back(ticket)
        return over

    def _look_after(self):
        """Count the workers, and find what was lost with one of them, and what hangs."""
        self._count_workers()
        if self.placed is not None and self.placed.status in ("lost", "cancelled"):
            self._place()
            for ticket in list(self.futures):
                self._drop(ticket)
                self.ledger.give_back(ticket)
        lost = [t for t, f in self.futures.items() if f.status in ("lost", "cancelled")]
        for ticket in lost:
            self._drop(ticket)
            self.ledger.give_back(ticket)
        return self._end_what_hangs() if self.limit is not None else []

    def _drop(self, ticket):
        self.client.cancel([self.futures.pop(ticket)], force=True)

    def _end_what_hangs(self):
        limits = {
            future.key: self.limit * len(self.ledger.running[ticket])
            for ticket, future in self.futures.items()
        }
        found = self.client.run(_overdue, limits, on_error="ignore")
        hanging = {worker: keys for worker, keys in found.items() if keys}
        over = []
        for key in [key for keys in hanging.values() for key in keys]:
            ticket = next((t for t, future in self.futures.items() if future.key == key), None)
            if ticket is not None:
                self._drop(ticket)
                words = f"it took longer than {self.limit:g} s"
                over += self.ledger.blame(ticket, words)
        if watched := [worker for worker in hanging if self._is_watched(worker)]:
            # A thread cannot be stopped from outside: its process has to go.
            self.client.run(_leave, workers=watched, on_error="ignore")
        return over

    def _is_watched(self, worker):
        """Whether a nanny will start this worker anew; without one it is left busy for ever."""
        known = self.client.scheduler_info(n_workers=-1)["workers"].get(worker, {})
        return bool(known.get("nanny"))


def _call(function, batch, shared):
    """Run a batch on a worker: (pickled value, error, seconds) of each task."""
    outcomes = []
    for arguments in batch:
        start = time.perf_counter()
        try:
            value = function(*arguments) if shared is None else function(*arguments, shared)
            # Here, where it can fail for this task alone.
            value, error = cloudpickle.dumps(value), None
        except Exception as failure:
            value, error = None, _words(failure)
        outcomes.append((value, error, time.perf_counter() - start))
    return outcomes


def _unpacked(outcome):
    value, error, seconds = outcome
    return value if value is None else cloudpickle.loads(value), error, seconds


def _words(error):
    """The last line of a traceback: an error itself may not survive the way to the client."""
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]


def _leave():
    """End this worker's process at once."""
    os._exit(1)


def _overdue(limits, dask_worker):
    """The keys, among those with a limit, that run on this worker for longer than it."""
    now = time.time()
    return [
        task.key
        for task in dask_worker.state.executing
        if task.key in limits and task.start_time and now - task.start_time > limits[task.key]
    ]
