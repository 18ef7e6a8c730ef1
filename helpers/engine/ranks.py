"""What a program sees of the run: its own rank, with its memory, its record and its background."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from helpers.engine.events import Event
from helpers.engine.groups import BACKGROUND, MOST_ATTACHED, PROGRAM, Group
from helpers.engine.mesh import Mesh
from helpers.engine.ports import Port
from helpers.engine.transport import Endpoint
from helpers.limits import usable_memory

LITTLE_HELD, MOST_HELD = 2**26, 0.5
"""Of peers' segments so many bytes are kept attached in any case, and at most this part of the
memory that is free."""


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
