"""The book of a run of tasks: what waits, what runs, and what is done. It knows no engine.

Every result is taken once, whatever happens on the way: workers die, tasks fail, hang, or are run
twice because somebody thought that they were lost.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import count

from helpers.planner.tasks import batch_size

LOST = 3
"""How many workers may be lost with a task alone until it counts as the cause; Dask's number."""


@dataclass(frozen=True)
class Done:
    """A task that is over.

    Attributes
    ----------
    number : hashable
        Which task.
    value : object
        What its function returned; None when it failed for good.
    error : str or None
        Why it failed.
    attempts : int
        How often it was tried; being lost with a worker counts only in the end.
    seconds : float
        How long the last attempt ran; 0 if it did not come back.
    """

    number: Hashable
    value: object = None
    error: str | None = None
    attempts: int = 1
    seconds: float = 0.0


class Ledger:
    """Tasks that wait or run, dealt out in batches.

    A batch that is dealt out has a ticket. It is settled with the outcomes of its tasks, given back
    (it has not begun), lost (with its worker), or blamed (one of its tasks did harm).

    Parameters
    ----------
    retries : int
        How often a task may fail before it is over.
    batch : int or "guided"
        Tasks of a batch, see `helpers.planner.tasks.batch_size`.

    Raises
    ------
    ValueError
        A number is impossible.

    Examples
    --------
    >>> ledger = Ledger(retries=1)
    >>> ledger.add("a", arguments=(1,))
    >>> ticket, batch = ledger.take(workers=2)
    >>> ledger.settle(ticket, [(None, "no luck", 0.1)])  # it waits again
    []
    >>> ticket, batch = ledger.take(workers=2)
    >>> ledger.settle(ticket, [(42, None, 0.1)])
    [Done(number='a', value=42, error=None, attempts=2, seconds=0.1)]
    >>> ledger.settle(ticket, [(42, None, 0.1)])  # a second delivery counts for nothing
    []
    """

    def __init__(self, retries: int = 2, batch: int | str = 1):
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries is {retries!r}: give a whole number from 0 on.")
        batch_size(batch, 1, 1)
        self.retries, self.batch = retries, batch
        self.running: dict[int, list] = {}
        self._waiting: list[tuple] = []  # (-priority, order, number)
        self._tasks: dict[Hashable, _Task] = {}
        self._tickets, self._order = count(), count()

    def __len__(self) -> int:
        """How many tasks are not over."""
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        """How many tasks wait to be dealt out."""
        return len(self._waiting)

    def add(self, number: Hashable, arguments: object, priority: float = 0) -> None:
        """A new task; one with a higher priority is dealt out first.

        Raises
        ------
        ValueError
            There is a task of this number already, or its priority is no number.
        """
        if number in self._tasks:
            raise ValueError(f"task {number!r} is there already: give each a number of its own.")
        if math.isnan(priority):
            raise ValueError(f"task {number!r} has the priority NaN: give a number.")
        self._tasks[number] = _Task(arguments, priority)
        self._wait(number, next(self._order))

    def take(self, workers: int) -> tuple[int, list] | None:
        """The ticket and the arguments of the next batch; None if no task waits."""
        if not self._waiting:
            return None
        numbers = [self._next()]
        size = batch_size(self.batch, 1 + len(self._waiting), workers)
        while len(numbers) < size and self._waiting and not self._alone(numbers[0]):
            if self._alone(self._waiting[0][-1]):
                break
            numbers.append(self._next())
        ticket = next(self._tickets)
        self.running[ticket] = numbers
        return ticket, [self._tasks[number].arguments for number in numbers]

    def settle(self, ticket: int, outcomes: Iterable[tuple]) -> list[Done]:
        """Take ``(value, error, seconds)`` of each task of a batch; returns the tasks now over."""
        pairs = zip(self.running.pop(ticket, ()), outcomes)
        return [done for number, outcome in pairs for done in self._settle(number, *outcome)]

    def give_back(self, ticket: int) -> None:
        """The batch has not begun: its tasks wait again, in front of their equals."""
        for number in self.running.pop(ticket, ()):
            self._wait(number, order=-1)

    def blame(self, ticket: int, which: int, error: str) -> list[Done]:
        """One task of the batch did harm: it has failed. The others wait again, in front."""
        numbers = self.running.get(ticket, ())
        guilty = numbers[which : which + 1]
        self.running[ticket] = [number for number in numbers if number not in guilty]
        self.give_back(ticket)
        return [done for number in guilty for done in self._settle(number, None, error, 0.0)]

    def lose(self, ticket: int, error: str) -> list[Done]:
        """A worker was lost while the batch ran, maybe because of it; returns the tasks now over.

        Its tasks wait again, behind their equals, and are tried alone. A task alone that has lost
        more than `LOST` workers is over.
        """
        numbers = self.running.pop(ticket, ())
        for number in numbers:
            task = self._tasks[number]
            task.lost += len(numbers) == 1
            task.alone = True
            if task.lost > LOST:
                del self._tasks[number]
                error = f"it was lost with {task.lost} workers: {error}"
                return [Done(number, None, error, task.attempts + 1)]
            self._wait(number, next(self._order))
        return []

    def _settle(self, number, value, error, seconds):
        task = self._tasks[number]
        task.attempts += 1
        if error is not None and task.attempts <= self.retries:
            self._wait(number, next(self._order))
            return []
        del self._tasks[number]
        return [Done(number, value, error, task.attempts, seconds)]

    def _wait(self, number, order):
        heapq.heappush(
            self._waiting, (-self._tasks[number].priority, order, next(self._order), number)
        )

    def _next(self):
        return heapq.heappop(self._waiting)[-1]

    def _alone(self, number):
        return self._tasks[number].alone


@dataclass
class _Task:
    arguments: object
    priority: float
    attempts: int = 0
    lost: int = 0
    alone: bool = False
