"""Groups of ranks: how one rank sends to the others, receives, and looks at their memory."""

from __future__ import annotations

import math
import operator
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from helpers.engine.channels import Incoming, Label, small_message
from helpers.engine.errors import PeerLost

if TYPE_CHECKING:
    from helpers.engine.ranks import Rank

PROGRAM, BACKGROUND = 0, 1
MOST_ATTACHED = 64
NOTHING = np.empty(0, np.uint8)
NOWHERE = (0, 0)  # segments are counted from 1


class Meeting(NamedTuple):
    """A meeting with ranks of other processes, as it went the last time.

    Attributes
    ----------
    sendings : list of (channel, message)
    hearings : list of (callable, message)
        A channel's `hears`, and the message that is expected.
    otherwise : list of callable
        For each hearing, a generator that deals with whatever comes, or with nothing yet.
    values : list
        For each hearing, what the expected message stands for.
    """

    sendings: list
    hearings: list
    otherwise: list
    values: list


class Group:
    """Ranks that exchange arrays with each other.

    Attributes
    ----------
    rank, size : int
        The number of this rank within the group, and of its members.
    members : tuple of int
        The members' numbers in the whole run.
    axis : str
        The axis of the mesh along which they lie.
    """

    def __init__(self, owner: Rank, axis: str, members: tuple[int, ...], lane: int = PROGRAM):
        self.axis, self.members, self.lane = axis, members, lane
        self.rank, self.size = members.index(owner.index), len(members)
        self.owner = owner
        self._endpoint = owner.endpoint
        self._behind = None
        self._names = {}  # (name, dtype, shape) -> the words for this call
        self._incoming = {}  # source -> its channel
        self._seen = {}  # (what, place, kind) -> what came in an earlier `look`
        self._again = {}  # a meeting -> what was sent and heard at the last one like it
        self.near = all(map(self._endpoint.near, members))
        self._all_here = all(map(self._endpoint.here, members))
        owner.add(self)

    def __repr__(self):
        return f"<Group {self.axis}: rank {self.rank} of {self.size}>"

    # ------------------------------------------------------------ two ranks

    def send(self, array, to: int, what: str = "a message") -> None:
        """Send an array; returns when the caller may change it.

        Parameters
        ----------
        array : array_like
            Any shape, any dtype but object.
        to : int
            Number within the group.
        """
        array = sendable(array)
        doing = f"{what}: send to rank {self._member(to)}"
        self._complete("send", doing, [self._sending(array, to, what)])

    def post(self, array, to: int, what: str = "a message", room: int | None = None) -> None:
        """Send an array without waiting until it has gone.

        What does not go at once goes on whenever this rank posts or waits for something, in the
        order of posting. Leave the array alone until then: a program that makes a new array for
        each message is right. The run ends only when all has been sent.

        Parameters
        ----------
        array, to
            As in `send`.
        room : int, optional
            Bytes that may be on their way to that rank. Counts if this is the first message there
            that goes through shared memory. Default: 1 MiB.
        """
        array = sendable(array)
        channel, port = self.owner.channel(self._member(to), self.lane), self.owner.port(self.lane)
        port.check_whole(what)
        start = time.monotonic()
        if room is not None:
            channel.make_room(room)
        port.post(channel, channel.sending(what, array))
        port.note("send", start, time.monotonic(), array.nbytes)

    def receive(self, source: int, out=None, what: str = "a message") -> np.ndarray:
        """Receive the next array from a rank, in the order in which it sent them.

        Parameters
        ----------
        source : int
            Number within the group.
        out : numpy.ndarray, optional
            Filled and returned; its dtype and shape must be the sender's.

        Raises
        ------
        Mismatch
            Another kind of message came, or another dtype or shape.
        Unanswered
            Nothing came within the run's patience.
        PeerLost
            The other rank has gone.
        """
        doing = self._doing(what, "", source)
        return self._complete("receive", doing, [self._receiving(source, out, what)])[0]

    def exchange(
        self, array, to: int, source: int, out=None, combine=None, what: str = "a message"
    ) -> np.ndarray:
        """Send one array and receive another at the same time; cannot deadlock.

        Parameters
        ----------
        array, to
            As in `send`.
        source, out
            As in `receive`.
        combine : numpy.ufunc, optional
            ``combine(out, received, out=out)`` takes the place of copying into `out`, piece by
            piece while they come.
        """
        array = sendable(array)
        doing = self._doing(what, f"send to rank {self._member(to)} and", source)
        operations = [self._sending(array, to, what), self._receiving(source, out, what, combine)]
        return self._complete("exchange", doing, operations, array.nbytes)[1]

    def take(self, out, source: int, combine, what: str = "a message") -> np.ndarray:
        """Receive an array and combine it with `out` in place, piece by piece as it comes."""
        doing = self._doing(what, "", source)
        return self._complete("receive", doing, [self._receiving(source, out, what, combine)])[0]

    def signal(self, to: int, source: int, what: str) -> None:
        """Tell one rank that this one is here, and wait for the same from another."""
        key = what, to, source
        known = self._again.get(key)
        if known is not None:
            self._meet_again(what, known)
            return
        operations = [self._posting(what, NOTHING, to), self._hearing(what, source)]
        self._complete("meet", what, operations)
        if not (self._endpoint.here(self._member(to)) or self._endpoint.here(self._member(source))):
            message = self._packed(what, NOTHING)
            self._again[key] = Meeting(
                [(self.owner.channel(self._member(to), self.lane), message)],
                [(self._incoming[source].hears, message)],
                [partial(self._hearing, what, source)],
                [None],
            )

    def _meet_again(self, what: str, known: Meeting) -> list:
        """Meet as the last time; returns ``known.values``, or a list with what came instead.

        Nearly always it is over before anybody has to sleep. Then the machinery for waiting is not
        needed, which costs more than the messages.
        """
        port = self.owner.port(self.lane)
        port.check_whole(what)
        port.settle(what, *(channel for channel, _ in known.sendings))
        began, unsent, late = time.monotonic(), [], []
        for channel, message in known.sendings:
            if rest := channel.post(message):
                unsent.append(channel.posting(rest))
        for number, (hears, message) in enumerate(known.hearings):
            if not hears(message):
                late.append(number)
        if not (late or unsent):
            port.note("meet", began, time.monotonic())
            return known.values
        operations = [known.otherwise[number]() for number in late] + unsent
        found, values = self._complete("meet", what, operations), known.values.copy()
        for number, value in zip(late, found):
            values[number] = value
        return known.values if all(map(operator.is_, values, known.values)) else values

    def _posting(self, what, array, to):
        channel = yield from self._channel_to(to)
        if self._endpoint.here(self._member(to)):
            yield from channel.sending(what, array)
        else:
            yield from channel.posting(self._packed(what, array))

    def _hearing(self, what, source):
        channel = yield from self._channel_from(source)
        again = False
        if not self._endpoint.here(self._member(source)):
            again = yield from channel.receiving_again(self._packed(what, NOTHING))
        if not again:
            yield from channel.receiving(Incoming(what))

    def _sending(self, array, to, what):
        # Inside a generator, so that an error on the way gets this exchange's name.
        channel = yield from self._channel_to(to)
        yield from channel.sending(what, array)

    def _channel_to(self, to):
        """The channel to a member, once all that was posted on it has been sent."""
        channel = self.owner.channel(self._member(to), self.lane)
        while self.owner.port(self.lane).posted(channel):
            yield None
        return channel

    def _receiving(self, source, out, what, combine=None):
        into = out
        if out is not None and not out.flags.c_contiguous:
            into = np.ascontiguousarray(out)
        channel = yield from self._channel_from(source)
        received = yield from channel.receiving(Incoming(what, into, combine))
        if into is not out:
            out[...] = received
            return out
        return received

    def _channel_from(self, source):
        channel = self._incoming.get(source)
        if channel is None:
            member = self._member(source)
            while True:
                channel = self._endpoint.incoming(member, self.owner.index, self.lane)
                if channel is not None:
                    break
                if member in self._endpoint.finished and not self._endpoint.is_coming():
                    raise PeerLost("the other rank has ended its program")
                yield None
            self._incoming[source] = channel
        return channel

    def _member(self, number):
        if not 0 <= number < self.size:
            raise ValueError(
                f"There is no rank {number} in this group: it has 0 to {self.size - 1}."
            )
        return self.members[number]

    def _doing(self, what, before, source):
        return f"{what}: {before} receive from rank {self._member(source)}".replace("  ", " ")

    def _complete(self, name, doing, operations, nbytes=0):
        return self.owner.port(self.lane).complete(doing, *operations, name=name, nbytes=nbytes)

    # ------------------------------------------------------------ what collectives need

    def call(self, name: str, array: np.ndarray | None = None) -> str:
        """The words for a collective call. They cross the wire, so that calls which do not fit
        together are found."""
        key = (name,) if array is None else (name, array.dtype, array.shape)
        if key not in self._names:
            lane = " in the background" if self.lane else ""
            text = f"{name} ({self.axis}{lane})"
            self._names[key] = text if array is None else str(Label.of(text, array))
        return self._names[key]

    def behind(self) -> Group:
        """The same group for communication in the background."""
        if self._behind is None:
            self._behind = Group(self.owner, self.axis, self.members, BACKGROUND)
        return self._behind

    def forget(self, channels: bool = False) -> None:
        """Give up what was seen of the others' memory, and at the end the channels too."""
        self._seen.clear()
        self._again.clear()
        if channels:
            self._incoming.clear()

    def expose(self, array: np.ndarray):
        """An array of the same values that the other members can look at, and where it lies.

        It is the array itself, or a copy in shared memory, which the next call uses again, or None
        where there is no room for one.
        """
        if self._all_here:
            return array, NOWHERE
        place = self._endpoint.whereabouts(array)
        if place is not None:
            return array, place
        nbytes = max(1, array.nbytes)
        kept = self.owner.scratch.get(self.lane)
        if kept is None or kept.nbytes < nbytes:
            kept = self.owner.scratch[self.lane] = self.owner.empty(nbytes, np.uint8)
        copy = kept[: array.nbytes].view(array.dtype).reshape(array.shape)
        place = self._endpoint.whereabouts(copy)
        if place is None:
            return None, NOWHERE
        copy[...] = array
        return copy, place

    def look(self, array: np.ndarray | None, what: str, place=None) -> list[np.ndarray] | None:
        """The members' arrays, seen where they lie in memory, without a copy.

        Every member calls this with an array in shared memory (see `expose`) of the same dtype and
        shape, or with None when it has no room for one; then the answer is None on all ranks. It
        returns when all have called; after it, all must agree once more before anybody changes its
        array.
        """
        if place is None:
            place = NOWHERE if array is None else self._endpoint.whereabouts(array) or NOWHERE
        kind = None if array is None else (array.dtype, array.shape)
        key = what, place, kind
        known = self._again.get(key)
        if known is None:
            views = self._look_first(key, array)
        else:
            views = self._meet_again(what, known)
            if views is known.values:
                return [*views[: self.rank], array, *views[self.rank :]]
            del self._again[key]  # somebody came with another array than the last time
        views.insert(self.rank, array)
        return None if any(view is None for view in views) else views

    def _look_first(self, key, array):
        """The others' views; what to send and to expect the next time is noted."""
        what, place, kind = key
        others = [number for number in range(self.size) if number != self.rank]
        if len(self._seen) >= MOST_ATTACHED:
            self.forget()  # so that segments which their owners have given up are freed
        seen = self._seen.setdefault(key, {})
        operations = [self._showing(what, array, place, number) for number in others]
        operations += [self._seeing(what, kind, number, seen) for number in others]
        views = self._complete("meet", what, operations)[len(others) :]
        if len(seen) == len(others) and place != NOWHERE:
            message = self._packed(what, np.array(place, np.int64))
            channels = [self.owner.channel(self._member(n), self.lane) for n in others]
            self._again[key] = Meeting(
                [(channel, message) for channel in channels],
                [(self._incoming[n].hears, seen[n][0]) for n in others],
                [partial(self._seeing, what, kind, n, seen) for n in others],
                [seen[n][1] for n in others],
            )
        return views

    def _showing(self, what, array, place, to):
        channel = yield from self._channel_to(to)
        if self._endpoint.here(self._member(to)):
            channel.put(Label(what, None, ()), array)
        else:
            yield from channel.posting(self._packed(what, np.array(place, np.int64)))

    def _seeing(self, what, kind, source, seen):
        """A view of another rank's array; it is made once, and then only asked for again."""
        channel = yield from self._channel_from(source)
        member = self._member(source)
        if self._endpoint.here(member):
            return (yield from channel.receiving(Incoming(what)))
        if source in seen:
            message, view = seen[source]
            if (yield from channel.receiving_again(message)):
                return view
        place = yield from channel.receiving(Incoming(what))
        number, start = map(int, place)
        if kind is None or (number, start) == NOWHERE:
            return None
        dtype, shape = kind
        memory = self.owner.attached(member, number)
        nbytes = math.prod(shape) * dtype.itemsize
        view = memory[start : start + nbytes].view(dtype).reshape(shape)
        seen[source] = small_message(what, place), view
        return view

    def _packed(self, what, array):
        key = what, array.tobytes()
        if key not in self._names:
            self._names[key] = small_message(what, array)
        return self._names[key]


def sendable(array) -> np.ndarray:
    """A contiguous array of plain values, or a sentence that says why it cannot be sent."""
    array = np.asarray(array, order="C")
    if array.dtype.hasobject:
        raise TypeError(
            "Ranks exchange arrays of numbers, not of Python objects: convert it with "
            "array.astype(float), or return objects as the program's result."
        )
    return array
