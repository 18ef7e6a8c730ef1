"""What a program sees of the run: its own rank, and the groups of ranks that it talks to."""

from __future__ import annotations

import math
import operator
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np

from helpers.engine.channels import Incoming, Label, small_message
from helpers.engine.errors import PeerLost
from helpers.engine.events import Event
from helpers.engine.mesh import Mesh
from helpers.engine.ports import Port
from helpers.engine.transport import Endpoint
from helpers.limits import usable_memory

PROGRAM, BACKGROUND = 0, 1
MOST_ATTACHED = 64
LITTLE_HELD, MOST_HELD = 2**26, 0.5
"""Of peers' segments so many bytes are kept attached in any case, and at most this part of the
memory that is free."""
NOTHING = np.empty(0, np.uint8)
NOWHERE = (0, 0)  # segments are counted from 1


class Rank:
    """One of the ranks that run a program together.

    Attributes
    ----------
    index, size : int
        The number of this rank, counted from 0, and of all ranks.
    coordinate : Coordinate
        Where it stands along the axes of the mesh.
    world, data, tensor, pipeline : Group
        All ranks, and those on the line through this one along an axis.
    """

    def __init__(
        self,
        index: int,
        mesh: Mesh,
        endpoint: Endpoint,
        patience: float = 6.0,
        record: bool = False,
    ):
        self.index, self.size, self.mesh = index, mesh.size, mesh
        self.coordinate = mesh.coordinate(index)
        self.endpoint = endpoint
        self.events: list[Event] | None = [] if record else None
        self._patience = patience
        self._channels = {}  # (target, lane) -> the channel on which this rank sends
        self._attached = {}  # (rank, segment) -> memory of a peer
        self.scratch = {}  # lane -> shared memory for copies
        self._failed = {}  # number of a work -> its error, as long as nobody has waited for it
        self._works = 0
        self._groups = []
        self._executor = None
        self._ports = {PROGRAM: self._open_port(PROGRAM)}
        for axis in ("world", "data", "tensor", "pipeline"):
            setattr(self, axis, Group(self, axis, mesh.members(index, axis)))

    def __repr__(self):
        return f"<Rank {self.index} of {self.size}: {self.coordinate}>"

    # ------------------------------------------------------------ memory

    def empty(self, shape, dtype=np.float64) -> np.ndarray:
        """An array in memory that peers on this host can look at; its values are not set.

        Collectives work on it without a copy. Where there is no room for shared memory, an
        ordinary array is returned: everything works as well, only more slowly.
        """
        dtype = np.dtype(dtype)
        if dtype.hasobject:
            raise TypeError(
                "Shared memory holds numbers, not Python objects: choose another dtype."
            )
        count = int(np.prod(shape, dtype=np.int64))
        alone = all(self.endpoint.here(rank) for rank in range(self.size))
        memory = None
        if count and not alone:
            memory = self.endpoint.share(count * dtype.itemsize)
        if memory is None:
            return np.empty(shape, dtype)
        return memory.view(dtype).reshape(shape)

    def zeros(self, shape, dtype=np.float64) -> np.ndarray:
        """Like `empty`, filled with zeros."""
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    # ------------------------------------------------------------ the record

    @contextmanager
    def record(self, operation: str, layer=None, microbatch=None, nbytes: int = 0):
        """Note what this rank computes here, and how long it takes.

        Examples
        --------
        >>> with rank.record("forward", layer=2):  # doctest: +SKIP
        ...     y = x @ w
        """
        if self.events is None:
            yield
            return
        start = time.monotonic()
        try:
            yield
        finally:
            length = time.monotonic() - start
            self.events.append(
                Event(self.index, operation, start, length, nbytes, layer, microbatch)
            )

    # ------------------------------------------------------------ in the background

    def background(self, exchange, group: Group, *args, **kwargs) -> Work:
        """Start an exchange that goes on while this rank computes.

        Parameters
        ----------
        exchange : callable
            A collective, or any function of a group.
        group : Group
            One of this rank's groups.
        *args, **kwargs
            Further arguments. Arrays must be left alone until the work is complete.

        Returns
        -------
        Work
            ``work.wait()`` gives the result. Works are carried out one after the other, in the
            order in which they were started: start them in the same order on all ranks.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="many-hands-background")
            self._ports[BACKGROUND] = self._open_port(BACKGROUND)
        self._works += 1
        act = (self._carry_out, self._works, exchange, group.behind())
        return Work(self, self._executor.submit(*act, *args, **kwargs), self._works)

    def _carry_out(self, number, exchange, group, *args, **kwargs):
        try:
            return exchange(group, *args, **kwargs)
        except BaseException as error:
            self._failed[number] = error
            raise

    # ------------------------------------------------------------ for the engine

    def port(self, lane: int) -> Port:
        """The place where this rank's thread for that lane waits."""
        return self._ports[lane]

    def channel(self, target: int, lane: int):
        """The channel to another rank; it is opened when it is first used."""
        key = target, lane
        if key not in self._channels:
            self._channels[key] = self.endpoint.outgoing(self.index, target, lane)
        return self._channels[key]

    def attached(self, rank: int, segment: int) -> np.ndarray:
        """The memory of a peer's segment, uint8; it is attached when it is first used."""
        key = rank, segment
        if key not in self._attached:
            # Segments that their owners have given up are freed when nobody here holds them.
            if len(self._attached) >= MOST_ATTACHED or self._holds_too_much():
                self._attached.clear()
                for group in self._groups:
                    group.forget()
            self._attached[key] = self.endpoint.attach(rank, segment)
        return self._attached[key]

    def _holds_too_much(self):
        held = sum(memory.nbytes for memory in self._attached.values())
        return held > LITTLE_HELD and held > usable_memory() * MOST_HELD

    @property
    def doing(self) -> str | None:
        """What this rank waits in at this moment, in words."""
        return next((port.doing for port in self._ports.values() if port.doing), None)

    def finish_background(self) -> None:
        """Carry out what the program has posted or started in the background and not waited for."""
        self._ports[PROGRAM].settle("sending what was posted")
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        for number in sorted(self._failed):
            raise self._failed[number]

    def waited_for(self, work: int) -> None:
        """The program knows how a work in the background has ended."""
        self._failed.pop(work, None)

    def add(self, group: Group) -> None:
        """Remember a group, to end it with this rank."""
        self._groups.append(group)

    def close(self, farewell: bool) -> None:
        """End this rank's connections; with a farewell when its program ended as it should."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=not farewell)
        for channel in self._channels.values():
            channel.close(farewell)
        # A rank and its groups refer to each other: without this, shared memory would be held until
        # the garbage collector comes by.
        for store in (self._channels, self._attached, self.scratch, self._failed):
            store.clear()
        for group in self._groups:
            group.forget(channels=True)
        for lane, port in self._ports.items():
            self.endpoint.ports.pop((self.index, lane), None)
            port.close()

    def _open_port(self, lane):
        record = None if self.events is None else self.events.append
        endpoint = self.endpoint
        port = Port(
            *(self.index, lane, self._patience, lambda: endpoint.ended, record),
            started=endpoint.missed_since,
        )
        self.endpoint.ports[self.index, lane] = port
        return port


class Work:
    """An exchange that goes on in the background."""

    def __init__(self, rank: Rank, future: Future, number: int):
        self._rank, self._future, self._number = rank, future, number

    def done(self) -> bool:
        """True when it is complete."""
        return self._future.done()

    def wait(self):
        """Wait until it is complete, and return its result or raise its error."""
        start = time.monotonic()
        try:
            return self._future.result()
        finally:
            self._rank.waited_for(self._number)
            self._rank.port(PROGRAM).note("wait", start, time.monotonic())


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
