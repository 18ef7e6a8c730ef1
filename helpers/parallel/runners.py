"""Runners: on each Dask worker an actor that calls one function, again and again.

A plain Dask task passes through the scheduler several times: it is placed, sent, reported, fetched
and forgotten. That takes processor time, on the cores that also work. The function and the data of
a search stay the same, so each worker gets them once, in an actor; then a batch of calls is one
message to it, and the results are the answer: less than half of the processor time of a task
(guarded in `tests/test_tasks.py`).

All actors of a worker share one thread, which runs their plain methods one after the other, in the
order in which they came. Their coroutines run at once, also while a call goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence

import cloudpickle
from distributed.client import _current_client

LEAVE_SECONDS = 2
"""How long a runner may take to answer that it begins nothing any more."""


class Runner:
    """An actor: a function, what its calls share, and the calls that go on or wait.

    Parameters
    ----------
    function : bytes
        Pickled: ``function(*arguments)``, or ``function(*arguments, shared)`` if something is
        shared.
    shared : object or None
    """

    _now = None  # what the thread of all runners does: runner, ticket, which call, since when

    def __init__(self, function: bytes, shared=None):
        self.function, self.shared = cloudpickle.loads(function), shared
        self._fates = {}  # ticket -> "begun" or "called off": whoever is first decides
        self._left = False

    def run(self, ticket: int, batch: Sequence[bytes]) -> list[tuple] | None:
        """``(pickled value, error, seconds)`` of each call; None if the batch was called off.

        Parameters
        ----------
        ticket : int
        batch : sequence of bytes
            The arguments of each call, pickled.
        """
        if self._left or self._fates.setdefault(ticket, "begun") == "called off":
            return None
        try:
            return [self._call(ticket, k, arguments) for k, arguments in enumerate(batch)]
        finally:
            Runner._now = None

    async def call_off(self, ticket: int) -> bool:
        """Whether the batch had not begun; then it never will."""
        return self._fates.setdefault(ticket, "called off") == "called off"

    async def leave(self) -> None:
        """Begin no batch any more."""
        self._left = True

    async def running(self) -> tuple[int | None, int, float] | None:
        """Which batch runs, which of its calls, and for how many seconds; None if none does.

        The ticket is None if the call belongs to a runner that has been left: it is in the way.
        """
        runner, ticket, which, since = Runner._now or (None, None, None, None)
        if runner is None or not (runner is self or runner._left):
            return None
        return ticket if runner is self else None, which, time.monotonic() - since

    def _call(self, ticket, which, arguments):
        Runner._now, start = (self, ticket, which, time.monotonic()), time.perf_counter()
        try:
            arguments = cloudpickle.loads(arguments)
            if self.shared is not None:
                arguments = *arguments, self.shared
            # Pickled here, where it can fail for this call alone.
            value, error = cloudpickle.dumps(self.function(*arguments)), None
        except BaseException as failure:  # also a SystemExit, which would end the worker's loop
            value, error = None, words_of(failure)
        return value, error, time.perf_counter() - start


def words_of(error: BaseException) -> str:
    """What went wrong, on one line: an error itself may not survive the way to the client.

    Examples
    --------
    >>> words_of(ValueError("no\\n  good")), words_of(SystemExit())
    ('ValueError: no good', 'SystemExit')
    """
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


class Line:
    """The runner of a worker, seen from the client: the batches on their way to it, in order.

    Answers go into a queue, as ``(line, what, ticket, answer, moment)``. `what` is "ready" (the
    answer is the runner), "run" or "call off" (what the runner's method gave), or "failed" (words).

    Parameters
    ----------
    client : distributed.Client
    worker : str
        The address of the worker.
    function, placed
        For the `Runner`; `placed` is a future or None.
    inbox : queue.SimpleQueue

    Attributes
    ----------
    runner : Runner or None
        None until the runner is ready; whoever takes the answer sets it.
    tickets : list of int
        The batches on their way, the oldest first.
    since : float
        When the oldest got its turn.
    placed : distributed.Future or None
        As given.
    """

    def __init__(self, client, worker: str, function: bytes, placed, inbox):
        self.client, self.worker, self.placed, self.inbox = client, worker, placed, inbox
        self.runner, self.tickets, self.since = None, [], time.monotonic()
        self._asked = set()  # tickets that were to be called off
        self._off = set()  # those that were, as long as the runner has them
        self._future = client.submit(
            Runner, function, placed, actor=True, workers=[worker], key=f"runner-{uuid.uuid4().hex}"
        )
        self._post("ready", None, self._start)

    @property
    def load(self) -> int:
        """How many batches the runner has."""
        return len(self.tickets) + len(self._off)

    @property
    def may_be_asked(self) -> bool:
        """Whether its last batch has not been asked for."""
        return bool(self.tickets) and self.tickets[-1] not in self._asked

    def send(self, ticket: int, batch: Sequence[bytes]) -> None:
        """Send the pickled arguments of each call of a batch."""
        if not self.tickets:
            self.since = time.monotonic()
        self.tickets.append(ticket)
        self._post("run", ticket, lambda: self.runner.run(ticket, batch))

    def done(self, ticket: int, moment: float) -> bool:
        """A batch has come back, and the next one has its turn; False if it was called off."""
        self._off.discard(ticket)
        if ticket not in self.tickets:
            return False
        self.tickets.remove(ticket)
        self.since = moment
        return True

    def call_off_last(self) -> None:
        """Ask for the last batch back, if it has not begun."""
        ticket = self.tickets[-1]
        self._asked.add(ticket)
        self._post("call off", ticket, lambda: self.runner.call_off(ticket))

    def called_off(self, ticket: int) -> None:
        """A batch was called off in time; the runner has it until those before it are over."""
        self.tickets.remove(ticket)
        self._off.add(ticket)

    def running(self, seconds: float) -> tuple[int | None, int, float] | None:
        """What `Runner.running` says.

        Raises
        ------
        Exception
            The worker is gone, or does not answer within so many seconds.
        """
        return self.runner.running().result(timeout=seconds)

    def leave(self) -> list[int]:
        """Call off what has not begun, let the runner go, and return the tickets. Waits for nobody.

        What comes from this line afterwards is not to be counted.
        """
        tickets, self.tickets = self.tickets, []
        to_tell = self.runner if tickets else None
        self.client.loop.add_callback(_leave, self.client, to_tell, self._future)
        return tickets

    def _post(self, what, ticket, call):
        self.client.loop.add_callback(self._answer, what, ticket, call)

    async def _answer(self, what, ticket, call):
        try:
            answer = await call()
        except (Exception, asyncio.CancelledError) as error:
            what, answer = "failed", words_of(error)
        self.inbox.put((self, what, ticket, answer, time.monotonic()))

    async def _start(self):
        # An actor talks through the client that is current where it arrives. Set here, and not by
        # `Client.as_current`, which also changes the settings of the whole process.
        _current_client.set(self.client)
        return await self._future


async def _leave(client, runner, future):
    if runner is not None:
        await _quietly(asyncio.wait_for(runner.leave(), LEAVE_SECONDS))
    # Only now: without the actor nobody could answer.
    await _quietly(client.cancel([future], force=True))


async def _quietly(answer):
    """The worker, or the whole cluster, may be gone."""
    try:
        await answer
    except (Exception, asyncio.CancelledError) as error:
        logging.getLogger(__name__).debug("while leaving: %r", error)
