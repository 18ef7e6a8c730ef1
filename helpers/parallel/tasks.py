"""Independent tasks on Dask workers: results as they come, each of them once.

Every worker has a runner (`helpers.parallel.runners`), which holds the function and the data. The
client keeps the book (`helpers.parallel.ledger`): it sends batches of tasks to the runners, counts
each result once, and gives to others what a dead or hanging worker had. The next task of a search
depends on results (`helpers.parallel.search`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import NamedTuple

import cloudpickle

from helpers.parallel.ledger import Done, Ledger
from helpers.parallel.runners import Line, words_of
from helpers.parallel.search import Job, as_loss

AHEAD = 2
"""Batches that are on their way for each worker: one runs, one lies ready."""
LOOK_SECONDS = 1.0
"""How often new, lost and hanging workers are looked for while somebody waits for results; and how
long a batch may wait for its turn until an idle worker asks for it."""
WAIT_SECONDS = 60.0
"""How long a search waits for workers: then it gives up if there is none, and warns if none has
time."""
STARTS = 3
"""How many runners may fail to start, one after the other."""
ANSWER_SECONDS = 1.0
"""How long a worker that may hang has to say what it does."""


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
        Comes to every worker once, however many tasks there are.
    priorities : iterable of float, optional
        One an item; a higher one starts before a lower one.
    batch : int or "guided"
        How many items are one message; "guided": many at first, then fewer and fewer.
    retries : int
        How often an item may fail and is tried again.
    limit : float, optional
        Seconds after which an item counts as hanging: it has failed once, and its worker is given
        up; one of our own is started anew. Default: never.
    ahead : int
        Batches that are on their way for each worker.

    Yields
    ------
    Done
        One for each item. Whoever stops before the end calls off what has not begun. A worker
        runs one item at a time, however many threads it has. New batches are sent when the next
        result is asked for.

    Raises
    ------
    ValueError
        A number is impossible, or there is not one priority an item.
    RuntimeError
        There is no worker, or none can load the function.
    Exception
        The function, an item or the shared data cannot be pickled, or the data not be loaded.

    Examples
    --------
    >>> for done in run_tasks(client, train, configs, shared=(X, y)):  # doctest: +SKIP
    ...     print(done.number, done.value)
    """
    items = list(items)
    priorities = [0] * len(items) if priorities is None else list(priorities)
    if len(priorities) != len(items):
        raise ValueError(f"{len(items)} items have {len(priorities)} priorities: give as many.")
    workers = _Workers(client, function, shared, batch, retries, limit, ahead)
    for number, (item, priority) in enumerate(zip(items, priorities)):
        workers.add(number, (item,), priority)
    with workers:  # only now is anything sent
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
        Jobs on their way for each worker. More keep workers busy, but the search then decides with
        fewer results.

    Yields
    ------
    Result

    Raises
    ------
    RuntimeError
        The search waits for a result although nothing runs; or as for `run_tasks`.

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
                workers.add((job.trial, job.budget), (job.config, job.budget))
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
    """Batches of a ledger on the runners of Dask workers."""

    def __init__(self, client, function, shared, batch, retries, limit, ahead):
        if limit is not None and not limit > 0:
            raise ValueError(f"limit is {limit}: give seconds above 0, or None.")
        if not (isinstance(ahead, int) and ahead >= 1):
            raise ValueError(f"ahead is {ahead}: give a whole number from 1 on.")
        self.client, self.limit, self.ahead = client, limit, ahead
        self.function = cloudpickle.dumps(function)
        self.ledger = Ledger(retries, batch)
        self.shared, self.placed = shared, None
        self.lines: dict[str, Line] = {}  # by the address of the worker
        self.hanging = set()  # addresses of workers that were given up
        self.inbox = queue.SimpleQueue()
        self.looked = time.monotonic()
        self.alone_since = None  # since when no worker is ready
        self.failed_starts = 0

    def __enter__(self):
        try:
            self._look_after()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info):
        for line in self.lines.values():
            line.leave()
        self.lines.clear()
        self.placed = None

    def add(self, number, arguments, priority=0):
        """A new task for the ledger; pickled here, so that nothing has run when it cannot be."""
        self.ledger.add(number, cloudpickle.dumps(arguments), priority)

    def results(self) -> Iterator[Done]:
        """All that come until no task is left."""
        while len(self.ledger):
            yield from self.wait()

    def places(self) -> int:
        """How many batches may be on their way."""
        return self.ahead * max(1, len(self.lines))

    def wait(self) -> list[Done]:
        """Deal out what waits, then wait until something has come; maybe nothing of use."""
        self._deal_out()
        self._even_out()
        look = LOOK_SECONDS if self.limit is None else min(LOOK_SECONDS, self.limit / 4)
        over = self._take_all(look)
        if time.monotonic() - self.looked > look:
            over += self._look_after()
            self.looked = time.monotonic()
        return over

    # ------------------------------------------------------------ batches

    def _deal_out(self):
        """Give to whoever has least on its way, as long as there is room."""
        ready = [line for line in self.lines.values() if line.runner is not None]
        while ready and self.ledger.waiting:
            line = min(ready, key=attrgetter("load"))
            if line.load >= self.ahead:
                return
            line.send(*self.ledger.take(len(self.lines)))

    def _even_out(self):
        """Nothing waits: whoever is idle shall have what lies ready elsewhere."""
        idle = sum(line.runner is not None and not line.load for line in self.lines.values())
        if not idle or self.ledger.waiting:
            return
        late = time.monotonic() - LOOK_SECONDS  # may wait behind work that is not ours
        full = [
            line
            for line in self.lines.values()
            if line.may_be_asked and (len(line.tickets) > 1 or line.since < late)
        ]
        for line in sorted(full, key=lambda line: -len(line.tickets))[:idle]:
            line.call_off_last()

    def _take_all(self, seconds):
        """Act on all messages, waiting for the first so long; returns the tasks now over."""
        over = []
        with contextlib.suppress(queue.Empty):
            over += self._take(*self.inbox.get(timeout=seconds))
            while True:
                over += self._take(*self.inbox.get_nowait())
        return over

    def _take(self, line, what, ticket, answer, moment):
        if self.lines.get(line.worker) is not line:
            return []  # of a worker that was given up
        if what == "failed":
            if line.runner is None and not _is_lost(line.placed):
                self._count_failed_start(answer)
            return self._lose(line, answer)
        if what == "ready":
            line.runner, self.failed_starts = answer, 0
        elif what == "run" and line.done(ticket, moment):
            if answer is not None:
                return self.ledger.settle(ticket, map(_unpacked, answer))
            self.ledger.give_back(ticket)  # it was called off, and this came first
        elif what == "call off" and answer and ticket in line.tickets:
            line.called_off(ticket)
            self.ledger.give_back(ticket)
        return []

    # ------------------------------------------------------------ workers

    def _look_after(self):
        """Give up workers that are gone or hang, and take on new ones; returns the tasks over."""
        there = self._workers_there()
        over = self._take_all(0)  # what came in the meantime
        for line in list(self.lines.values()):
            if line.worker not in there:
                over += self._lose(line, "the worker is gone")
            elif self.limit is not None and line.tickets:
                over += self._end_if_it_hangs(line)
        there -= self.hanging
        if there - set(self.lines) and self._place(there):
            for worker in sorted(there - set(self.lines)):
                line = Line(self.client, worker, self.function, self.placed, self.inbox)
                self.lines[worker] = line
        self._check_that_there_is_one()
        return over

    def _workers_there(self):
        """Addresses of the workers that may be used."""
        there = set(self.client.nthreads())
        self.hanging &= there  # a new one may have the address of one that hung
        return there & set(getattr(self.client, "in_use", None) or there) or there

    def _place(self, workers):
        """Whether the shared data lies with a worker: send it, if need be."""
        if self.shared is None or (self.placed is not None and not _is_lost(self.placed)):
            return True
        try:
            # In a list: of a tuple Dask would make one future for each of its parts.
            # To one worker: each runner fetches it from a worker that has it.
            [self.placed] = self.client.scatter([self.shared], workers=list(workers), hash=False)
        except (OSError, TimeoutError):  # of a worker that has just died: try again
            return False
        return True

    def _check_that_there_is_one(self):
        ready = any(line.runner is not None for line in self.lines.values())
        now = time.monotonic()
        self.alone_since = None if ready else self.alone_since or now
        if ready or now - self.alone_since <= WAIT_SECONDS:
            return
        if not self.lines:
            raise RuntimeError(
                f"No worker has come for {WAIT_SECONDS:.0f} s: start workers, or open the cluster "
                "anew, and run the search again."
            )
        warnings.warn(
            f"For {WAIT_SECONDS:.0f} s no worker has had time for the search: other tasks run on "
            "all of them. Wait, or stop those.",
            stacklevel=2,
        )
        self.alone_since = now

    def _count_failed_start(self, words):
        self.failed_starts += 1
        if self.failed_starts >= STARTS:
            raise RuntimeError(f"Workers cannot load the function or the data of tasks: {words}")

    def _lose(self, line, words):
        """The worker of a line is gone, or cannot be used."""
        del self.lines[line.worker]
        tickets = line.leave()
        for ticket in tickets[1:]:
            self.ledger.give_back(ticket)
        # The first has had its turn, so it may be to blame.
        return self.ledger.lose(tickets[0], words) if tickets else []

    def _end_if_it_hangs(self, line):
        waited = time.monotonic() - line.since
        if waited <= self.limit:
            return []
        try:
            ticket, which, seconds = line.running(ANSWER_SECONDS) or (None, None, 0)
        except TimeoutError:  # something holds all of the worker
            ticket, which, seconds = line.tickets[0], None, waited
        except Exception as error:
            return self._lose(line, words_of(error))
        if seconds <= self.limit:
            return []
        self.hanging.add(line.worker)
        del self.lines[line.worker]
        for other in line.leave():
            if other != ticket:
                self.ledger.give_back(other)
        if getattr(self.client, "cluster", None) is not None:  # else the cluster was joined
            self.client.loop.add_callback(_start_anew, self.client, line.worker)
        words = f"it took longer than {self.limit:g} s"
        if ticket not in self.ledger.running:  # what an older search has left there
            return []
        if which is None and len(self.ledger.running[ticket]) > 1:
            return self.ledger.lose(ticket, words)
        return self.ledger.blame(ticket, which or 0, words)


async def _start_anew(client, worker):
    """End the process of a worker that has a nanny, which then starts another one.

    A thread cannot be stopped from outside. Usually the worker can end itself at once; if it does
    not even answer, its nanny ends it. A worker without a nanny is left busy.
    """
    with contextlib.suppress(Exception):  # of a worker, or a whole cluster, that is gone
        known = (await client.scheduler.identity(n_workers=-1))["workers"]
        if not known[worker]["nanny"]:
            return
        end = client.run(os._exit, 1, workers=[worker], on_error="ignore")
        try:
            await asyncio.wait_for(end, ANSWER_SECONDS)
        except TimeoutError:
            await client.restart_workers([worker], raise_for_error=False)


def _is_lost(placed):
    return placed is not None and placed.status in ("lost", "cancelled")


def _unpacked(outcome):
    value, error, seconds = outcome
    if error is None:
        try:
            value = cloudpickle.loads(value)
        except Exception as failure:  # for this task alone
            value, error = None, words_of(failure)
    return value, error, seconds
