"""Where one thread of a rank waits: for messages, for room to send, and for the end of the run."""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress

from helpers.engine.channels import READ
from helpers.engine.errors import CommunicationError, RunEnded, Unanswered
from helpers.engine.events import Event

LONGEST_SLEEP = 60.0
"""Seconds."""
_SENT = object()


class Port:
    """The waiting place of one rank's program, or of its background communication.

    A bell (one end of a socket pair) lies in every wait. It is rung when another thread of this
    process has put a message into a queue, when a peer has connected, and when the run ends, so
    that all of these wake a rank that waits for something else.

    Parameters
    ----------
    rank : int
    lane : int
        0 for the program, 1 for its background communication.
    patience : float
        Seconds without a sign after which waiting is an error.
    ended : callable
        Returns the cause when the run has been ended, else None.
    record : callable, optional
        Takes an `Event`.
    started : callable
        Returns when all ranks had begun (`time.monotonic`); patience is counted from then on.
    """

    def __init__(
        self,
        rank: int,
        lane: int,
        patience: float,
        ended: Callable[[], str | None],
        record: Callable[[Event], None] | None = None,
        started: Callable[[], float] = lambda: 0.0,
    ):
        self.rank, self.lane, self.patience = rank, lane, patience
        self.doing: str | None = None  # what this rank waits in, for error messages
        self._ended, self._record, self._started = ended, record, started
        self._broken: str | None = None  # the exchange that failed here
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._rung = False
        self._heard = 0.0  # when something last came from those that this port waits for
        self._posted = {}  # channel -> sendings that go on while this rank computes or waits
        self._poll = select.poll()
        self._poll.register(self._bell, READ)

    def ring(self) -> None:
        """Wake this port; any thread may call it."""
        if not self._rung:
            self._rung = True
            with suppress(OSError):  # full, so it rings already; or closed, so nobody waits
                self._rope.send(b"!")

    def close(self) -> None:
        """Give the sockets back."""
        self._bell.close()
        self._rope.close()

    def check(self) -> None:
        """Raise `RunEnded` when the run has been ended elsewhere."""
        cause = self._ended()
        if cause is not None:
            raise RunEnded(cause)

    def check_whole(self, doing: str) -> None:
        """Raise when an earlier exchange has failed here.

        The rest of its message may still lie in a channel, and would be taken for this one.
        """
        if self._broken is not None:
            raise CommunicationError(
                f"{doing}: impossible after {self._broken} has failed on this rank."
            )

    def post(self, channel, sending: Generator) -> None:
        """Send as much as goes at once; the rest goes on whenever this port waits or posts."""
        self._posted.setdefault(channel, deque()).append(sending)
        self._carry_on()

    def posted(self, channel) -> bool:
        """True while something that was posted on a channel has not been sent."""
        return channel in self._posted

    def settle(self, doing: str, *channels) -> None:
        """Wait until what was posted has been sent: all of it, or what was on some channels."""
        if self._posted:
            self.complete(doing, self._sent(channels), name="send")

    def _sent(self, channels):
        while any(map(self.posted, channels or self._posted)):
            yield None

    def _carry_on(self):
        """Send what can be sent now of what was posted; returns what the rest waits for."""
        wishes = []
        for channel, sendings in list(self._posted.items()):
            while sendings:
                wish = next(sendings[0], _SENT)
                if wish is not _SENT:
                    wishes.append(wish)
                    break
                sendings.popleft()
            if not sendings:
                del self._posted[channel]
        return wishes

    def complete(self, doing: str, *operations: Generator, name: str = "", nbytes: int = 0) -> list:
        """Carry several sendings and receivings on until all are complete.

        Parameters
        ----------
        doing : str
            For messages: "receive from rank 3", "all_reduce 5 on data".
        operations : generators
            From `helpers.engine.channels`.
        name, nbytes
            For the recorded events.

        Returns
        -------
        list
            What the operations return.
        """
        self.check_whole(doing)
        results = [None] * len(operations)
        pending = dict(enumerate(operations))
        self.doing = doing
        began = self._heard = time.monotonic()
        try:
            while True:
                wishes = self._carry_on() if self._posted else []
                for number in list(pending):
                    try:
                        wishes.append(next(pending[number]))
                    except StopIteration as stop:
                        results[number] = stop.value
                        del pending[number]
                        self._heard = time.monotonic()
                if not pending:
                    break
                began = self._wait(wishes, began, name)
        except BaseException as error:
            self._broken = doing
            if not isinstance(error, CommunicationError | OSError):
                raise
            if isinstance(error, RunEnded | Unanswered):
                raise
            kind = type(error) if isinstance(error, CommunicationError) else CommunicationError
            raise kind(f"{doing}: {error}.") from None
        self.note(name, began, time.monotonic(), nbytes)
        self.doing = None
        return results

    def note(self, name: str, start: float, stop: float, nbytes: int = 0) -> None:
        """Record what this rank did between two readings of `time.monotonic`."""
        if self._record:
            self._record(Event(self.rank, name, start, stop - start, nbytes, lane=self.lane))

    def _wait(self, wishes, began, name):
        """Sleep until one wish may come true; returns the time when it woke."""
        self.check()
        descriptors = [wish for wish in wishes if wish is not None]
        for descriptor, event in descriptors:
            self._poll.register(descriptor, event)
        slept = time.monotonic()
        left = max(self._heard, self._started()) + self.patience - slept
        ready = self._poll.poll(min(max(0.0, left), LONGEST_SLEEP) * 1000)
        for descriptor, _ in descriptors:
            self._poll.unregister(descriptor)
        bell = self._bell.fileno()
        if self._rung or any(descriptor == bell for descriptor, _ in ready):
            self._answer_bell()
        self.check()
        woke = time.monotonic()
        if any(descriptor != bell for descriptor, _ in ready):
            self._heard = woke  # the bell alone says nothing about those we wait for
        elif woke > max(self._heard, self._started()) + self.patience:
            raise Unanswered(
                f"{self.doing}: nothing came for {self.patience:g} s. If the other ranks may "
                "compute for longer than that, give spmd.run a larger patience."
            )
        self.note(name, began, slept)
        self.note("wait", slept, woke)
        return woke

    def _answer_bell(self):
        # The one who rings sets the flag first and sends in a moment: what comes only after this
        # look is found by the next one.
        with suppress(BlockingIOError):
            self._bell.recv(64)
        self._rung = False
