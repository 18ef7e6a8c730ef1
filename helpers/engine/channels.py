"""One-way channels from one rank to another, for the three ways in which two ranks can meet.

* `LocalChannel`: both are threads of one process; an array is copied once.
* `Sender` and `Receiver` with a window: two processes of one host; the bytes lie in shared memory,
  and only a byte of signal for each piece crosses a Unix socket.
* `Sender` and `Receiver` without a window: the bytes go through the socket, TCP as a rule.

Sending and receiving are generators. They do what can be done now and yield what they wait for, a
pair (file descriptor, event of `select.poll`), or None for "until something happens". One rank can
so send and receive at the same time in one thread (see `helpers.engine.ports`), without which two
ranks that send each other more than the buffers hold would wait for ever.
"""

from __future__ import annotations

import ast
import ssl
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from helpers.engine.errors import Mismatch, PeerLost

READ, WRITE = 1, 4  # POLLIN and POLLOUT
INLINE_BYTES = 16 * 1024
"""Messages up to here go through the socket: cheaper than a second look at shared memory."""
SPINS = 15
"""Looks at a socket, about a microsecond each, before the thread goes to sleep."""
SLOT_BYTES, SLOTS = 512 * 1024, 2
"""A window's pieces. The receiver empties one slot while the sender fills the next."""
PIECE_BYTES = 256 * 1024
"""Bytes that are taken from a socket, and combined, while they are still in the cache."""

_HEADER = struct.Struct("<BIQ")
_THROUGH_SOCKET, _THROUGH_WINDOW, _FAREWELL = range(3)
_BLOCKED = (BlockingIOError, ssl.SSLWantReadError)


class Label(NamedTuple):
    """What a message is: the exchange it belongs to, and the array's type and shape."""

    what: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, what: str, array: np.ndarray) -> Label:
        return cls(what, array.dtype, array.shape)

    def pack(self) -> bytes:
        dtype = self.dtype.str if self.dtype.names is None else repr(self.dtype.descr)
        return f"{self.what}\n{dtype}\n{','.join(map(str, self.shape))}".encode()

    @classmethod
    def unpack(cls, text: bytes) -> Label:
        what, dtype, shape = text.decode().split("\n")
        if dtype.startswith("["):  # np.dtype alone would make fields of the gaps between fields
            dtype = np.lib.format.descr_to_dtype(ast.literal_eval(dtype))
        return cls(what, np.dtype(dtype), tuple(map(int, shape.split(","))) if shape else ())

    def __str__(self):
        return f"{self.what} of {self.dtype} {list(self.shape)}"


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array, shape (nbytes,), without a copy."""
    return array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)


@dataclass
class Incoming:
    """What the receiving end of a message does with it.

    Attributes
    ----------
    what : str
        The exchange in which the receiver is; a message of another one is a mismatch.
    out : numpy.ndarray, optional
        Contiguous; filled in place. Default: a new array of the sender's type and shape.
    combine : numpy.ufunc, optional
        ``combine(out, piece, out=out)`` for each piece as it comes, in place of copying it.
    """

    what: str
    out: np.ndarray | None = None
    combine: np.ufunc | None = None

    def accept(self, label: Label) -> np.ndarray:
        """The array to fill, once it is known what comes."""
        self.check(label)
        return np.empty(label.shape, label.dtype) if self.out is None else self.out

    def check(self, label: Label) -> None:
        """Raise `Mismatch` when the message is not the one that is expected here."""
        if label.what != self.what:
            theirs = label.what if label.what[-1] in ")]" else str(label)
            raise Mismatch(
                f"this rank is in {self.what}, but the other is in {theirs}: all ranks of a group "
                "must call the same exchanges, with arrays of one type and shape, in one order"
            )
        if self.out is not None and (self.out.dtype, self.out.shape) != label[1:]:
            raise Mismatch(
                f"this rank has room for {Label.of(self.what, self.out)}, but the other sent "
                f"{label}: dtype and shape of out must be the sender's"
            )

    def take(self, into: np.ndarray, start: int, piece: np.ndarray) -> None:
        """Put some bytes where they belong."""
        part = bytes_of(into)[start : start + piece.size]
        if self.combine is None:
            part[:] = piece
        else:
            part = part.view(into.dtype)
            self.combine(part, piece.view(into.dtype), out=part)


# ---------------------------------------------------------------- two threads of one process


@dataclass(eq=False)
class LocalChannel:
    """From one thread to another: a queue of arrays.

    Attributes
    ----------
    ring : callable
        Called when something was put in; it wakes the receiver.
    finished : callable
        True when the sender's program has ended.
    """

    ring: Callable[[], None]
    finished: Callable[[], bool]
    queue: deque = field(default_factory=deque)

    def put(self, label, value) -> None:
        """Hand over a value as it is; the receiver sees the very same object."""
        self.queue.append((label, value))
        self.ring()

    def sending(self, what: str, array: np.ndarray):
        """Send a copy, so that the sender may use its array again at once."""
        self.put(Label.of(what, array), array.copy())
        return
        yield

    def make_room(self, nbytes: int) -> None:
        """Nothing to do: there is always room."""

    def receiving(self, incoming: Incoming):
        """Wait for the next array."""
        while not self.queue:
            if self.finished() and not self.queue:
                raise PeerLost("the other rank has ended its program")
            yield None
        label, value = self.queue.popleft()
        incoming.check(label)
        if incoming.out is None:
            return value
        incoming.take(incoming.out, 0, bytes_of(value))
        return incoming.out

    def unread(self) -> str:
        """What has come and was not received, in words; "" for nothing."""
        return str(self.queue[0][0].what) if self.queue else ""

    def close(self, farewell: bool) -> None:
        """Nothing to do: what lies in the queue can still be received."""


# ---------------------------------------------------------------- two processes


def small_message(what: str, array: np.ndarray) -> bytes:
    """A whole message as it crosses a socket: header, label and bytes."""
    label = Label.of(what, array).pack()
    return _HEADER.pack(_THROUGH_SOCKET, len(label), array.nbytes) + label + array.tobytes()


class Sender:
    """The sending end of a connection.

    Parameters
    ----------
    sock : socket.socket
        Connected and authenticated.
    open_window : callable, optional
        Returns (number, memory) of a shared segment of so many bytes, or None where there is
        no room; then, and without it, all bytes go through the socket.
    """

    def __init__(self, sock, open_window=None):
        sock.setblocking(False)
        self._sock, self._fd = sock, sock.fileno()
        self._open_window = open_window
        self._window = None
        self._piece = 0  # pieces written so far
        self._credit = self._slots = SLOTS  # slots that are free, and all slots

    def make_room(self, nbytes: int) -> None:
        """Let so many bytes be on their way, if the window has not been opened yet."""
        if self._open_window is not None:
            self._credit = self._slots = max(SLOTS, -(-nbytes // SLOT_BYTES))

    def sending(self, what: str, array: np.ndarray):
        """Send one array; ends when the array may be used again."""
        if array.nbytes <= INLINE_BYTES:
            yield from self.posting(small_message(what, array))
            return
        label, payload = Label.of(what, array).pack(), bytes_of(array)
        if self._find_window() is None:
            header = _HEADER.pack(_THROUGH_SOCKET, len(label), payload.size)
            yield from self._write(header + label)
            yield from self._write(payload)
        else:
            header = _HEADER.pack(_THROUGH_WINDOW, len(label), payload.size)
            number = self._window[0].to_bytes(8, "little")
            yield from self._write(header + label + number)
            yield from self._through_window(payload)

    def posting(self, message: bytes):
        """Send a message that was packed before."""
        yield from self._write(message)

    def post(self, message: bytes) -> bytes:
        """Send as much of such a message as goes at once; returns what is left of it.

        Where the other end has gone nothing goes; `posting` says so.
        """
        try:
            return message[self._sock.send(message) :]
        except OSError:
            return message

    def _find_window(self):
        if self._window is None and self._open_window is not None:
            self._window = self._open_window(self._slots * SLOT_BYTES)
            self._open_window = None  # asked once: where there is no room now, there will be none
        return self._window

    def _through_window(self, payload):
        slots = self._window[1].reshape(self._slots, SLOT_BYTES)
        for start in range(0, payload.size, SLOT_BYTES):
            while not self._credit:
                yield from self._collect_credit()
            piece = payload[start : start + SLOT_BYTES]
            slots[self._piece % self._slots, : piece.size] = piece
            self._piece += 1
            self._credit -= 1
            yield from self._write(b"+")

    def _collect_credit(self):
        try:
            credit = len(self._sock.recv(self._slots))
        except _BLOCKED:
            yield self._fd, READ
            return
        except OSError:
            credit = 0
        if not credit:
            raise PeerLost("the other rank has gone")
        self._credit += credit

    def _write(self, data):
        left = len(data)
        while left:
            try:
                sent = self._sock.send(data)
                if sent == left:
                    return
                data = memoryview(data)[sent:]
                left -= sent
            except (*_BLOCKED, ssl.SSLWantWriteError):
                yield self._fd, WRITE
            except OSError:
                raise PeerLost("the other rank has gone") from None

    def close(self, farewell: bool) -> None:
        """End the connection; a farewell says that the program ended as it should."""
        # Where the other end has gone, or its buffer is full, it sees the end of the connection.
        with suppress(OSError):
            if farewell:
                self._sock.send(_HEADER.pack(_FAREWELL, 0, 0))
        self._sock.close()
        self._window = self._open_window = None  # the memory is free without the garbage collector


class Receiver:
    """The receiving end of a connection.

    Parameters
    ----------
    sock : socket.socket
        Connected and authenticated.
    attach : callable
        ``attach(number)`` is the memory of the sender's segment with this number.
    """

    def __init__(self, sock, attach):
        sock.setblocking(False)
        self._sock, self._fd = sock, sock.fileno()
        self._attach = attach
        self._window = None
        self._piece = 0
        self._buffer = bytearray(INLINE_BYTES * 2)  # read, and not yet used
        self._ahead = memoryview(self._buffer)
        self._start = self._stop = 0
        self._scratch = None

    def receiving(self, incoming: Incoming):
        """Receive one array."""
        kind, length, nbytes = _HEADER.unpack((yield from self._read(_HEADER.size)))
        if kind == _FAREWELL:
            raise PeerLost("the other rank has ended its program")
        label = Label.unpack((yield from self._read(length)))
        array = incoming.accept(label)
        if kind == _THROUGH_WINDOW:
            number = int.from_bytes((yield from self._read(8)), "little")
            yield from self._through_window(number, nbytes, incoming, array)
        elif incoming.combine is None:
            yield from self._fill(memoryview(bytes_of(array)))
        else:
            yield from self._combine(nbytes, incoming, array)
        return array

    def receiving_again(self, message: bytes):
        """Receive a message that is known beforehand.

        True when it came, and is used up. False when another one comes, which is left for
        `receiving`. Looking for a moment before going to sleep saves the time of waking up: a peer
        on another core answers within microseconds.
        """
        if self.hears(message):
            return True
        while not self._has(len(message)):
            if self._stop - self._start >= _HEADER.size:
                return False  # a shorter one may be all that comes
            yield self._fd, READ
        return self._skip(message)

    def hears(self, message: bytes) -> bool:
        """Look for this message for a moment; True when it came, and is used up."""
        length, buffer = len(message), self._buffer
        for _ in range(SPINS):
            if self._has(length):
                if not buffer.startswith(message, self._start, self._stop):
                    return False
                self._start += length
                return True
        return False

    def _has(self, nbytes):
        """Look once whether so many bytes are there."""
        if self._stop - self._start < nbytes:
            self._make_room(nbytes)
            try:
                come = self._sock.recv_into(self._ahead[self._stop :])
            except _BLOCKED:
                return False
            except OSError:
                come = 0
            if not come:
                return True  # the end of the connection: `receiving` will say so
            self._stop += come
        return self._stop - self._start >= nbytes

    def _skip(self, message):
        if not self._buffer.startswith(message, self._start, self._stop):
            return False
        self._start += len(message)
        return True

    def _through_window(self, number, nbytes, incoming, array):
        if self._window is None:
            self._window = self._attach(number).reshape(-1, SLOT_BYTES)
        for start in range(0, nbytes, SLOT_BYTES):
            yield from self._read(1)
            size = min(SLOT_BYTES, nbytes - start)
            incoming.take(array, start, self._window[self._piece % len(self._window), :size])
            self._piece += 1
            with suppress(OSError):  # the sender may have ended after its last piece
                self._sock.send(b"-")

    def _combine(self, nbytes, incoming, array):
        if self._scratch is None:
            self._scratch = np.empty(PIECE_BYTES, np.uint8)
        for start in range(0, nbytes, PIECE_BYTES):
            piece = self._scratch[: min(PIECE_BYTES, nbytes - start)]
            yield from self._fill(memoryview(piece))
            incoming.take(array, start, piece)

    def _read(self, nbytes):
        """The next few bytes, through the buffer."""
        if nbytes > len(self._ahead):  # the label of an array with very many fields
            read = bytearray(nbytes)
            yield from self._fill(memoryview(read))
            return bytes(read)
        while self._stop - self._start < nbytes:
            self._make_room(nbytes)
            self._stop += yield from self._receive_into(self._ahead[self._stop :])
        read = bytes(self._ahead[self._start : self._start + nbytes])
        self._start += nbytes
        return read

    def _make_room(self, nbytes):
        if self._start == self._stop:
            self._start = self._stop = 0
        elif self._start + nbytes > len(self._ahead):
            left = self._stop - self._start
            self._ahead[:left] = self._ahead[self._start : self._stop]
            self._start, self._stop = 0, left

    def _fill(self, into):
        """Fill a buffer: first with what was read ahead, then straight from the socket."""
        ahead = min(self._stop - self._start, into.nbytes)
        into[:ahead] = self._ahead[self._start : self._start + ahead]
        self._start += ahead
        while ahead < into.nbytes:
            ahead += yield from self._receive_into(into[ahead:])

    def _receive_into(self, into):
        while True:
            try:
                nbytes = self._sock.recv_into(into)
                break
            except _BLOCKED:
                yield self._fd, READ
            except OSError:
                nbytes = 0
                break
        if not nbytes:
            raise PeerLost("the other rank has gone")
        return nbytes

    def unread(self) -> str:
        """What has come and was not received, in words; "" for nothing."""
        self._has(_HEADER.size)
        if self._stop - self._start < _HEADER.size:
            return ""
        kind, length, _ = _HEADER.unpack_from(self._buffer, self._start)
        if kind == _FAREWELL:
            return ""
        first = self._start + _HEADER.size
        label = bytes(self._buffer[first : min(first + length, self._stop)])
        return label.partition(b"\n")[0].decode(errors="replace") or "a message"

    def close(self, farewell: bool) -> None:
        """End the connection."""
        self._sock.close()
        self._window = None
