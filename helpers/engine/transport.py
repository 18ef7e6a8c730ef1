"""How the ranks in one process reach those in others, and how others reach them.

Each process that holds ranks of a run has one `Endpoint`. It listens on a Unix socket for peers on
the same host, and on TCP for those on other hosts (with TLS where the Dask cluster uses TLS). A
channel is dialled by the rank that sends first, in that direction only. Plain sockets were chosen
after measurement: `benchmarks/README.md` has the figures of multiprocessing.connection, pyzmq and
plain sockets side by side.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import sys
import tempfile
import threading
import time
import uuid
import weakref
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from helpers.engine import handshake
from helpers.engine.channels import LocalChannel, Receiver, Sender
from helpers.engine.errors import CommunicationError, PeerLost, RunEnded
from helpers.engine.handshake import CHANNEL, SEGMENT, Request
from helpers.engine.memory import attach, create

AGAIN_SECONDS = 0.02
"""After a connection that could not be made now, so long until the next attempt."""
CALLER_SECONDS = 3.0
"""The caller of a run gives a sign at least so often."""
MOST_GUESTS = 256
"""Connections at one time that have not yet proved to know the secret; more push out the oldest.
An honest one is through within milliseconds."""
MOST_PLACES = 1024
UNCLAIMED_SECONDS = 30.0
"""An endpoint that nobody uses any more closes itself after this time: its caller has died."""
_NOT_YET = (errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK)


@dataclass(frozen=True)
class Address:
    """Where an endpoint is found.

    Attributes
    ----------
    process : str
        Different for every endpoint: ranks with the same one are threads of one process.
    host : str
        Equal for processes that share a kernel and a network namespace.
    unix : str
        Name of the Unix socket; "" where there is none.
    tcp : tuple of (str, int)
        Host and port.
    clock : float
        `time.monotonic` there, when this address was made, s.
    """

    process: str
    host: str
    unix: str
    tcp: tuple[str, int]
    clock: float


@dataclass
class Security:
    """What protects the connections of one run.

    Attributes
    ----------
    secret : bytes
        Drawn for this run, known to its ranks only.
    dialler, listener : ssl.SSLContext, optional
        Those of the Dask worker, where the cluster uses TLS.
    """

    secret: bytes
    dialler: object = None
    listener: object = None


@dataclass
class Endpoint:
    """One process's end of all the connections of a run.

    Parameters
    ----------
    security : Security
    host : str
        The interface on which TCP connections are accepted.
    only_tcp : bool
        Do not use shared memory between processes of one host.
    patience : float
        Seconds that the process of another rank may take to answer a call.
    started : float
        When it was known here that all ranks have begun (`time.monotonic`). Infinite: not yet;
        until then nobody is missed as long as the caller of the run gives signs.
    """

    security: Security
    host: str = "127.0.0.1"
    only_tcp: bool = False
    patience: float = 6.0
    started: float = 0.0
    ended: str | None = None
    ports: dict = field(default_factory=dict)  # (rank, lane) -> Port
    table: list = field(default_factory=list)  # rank -> Address
    finished: set = field(default_factory=set)  # ranks whose program has ended

    def __post_init__(self):
        self._lock = threading.RLock()  # a finalizer may run in a thread that holds it
        self._local = {}  # (source, target, lane) -> LocalChannel
        self._incoming = {}  # (source, target, lane) -> Receiver
        self._segments = {}  # number -> (descriptor, first address, bytes)
        self._places = {}  # (first address, bytes) of an array -> where it lies, or None
        self._numbers = 0
        self._windows = []
        self._listeners, self._threads, self._unix_folder = [], [], None
        self._guests = {}  # sockets that have not yet proved to know the secret, oldest first
        self.process = uuid.uuid4().hex
        self.address = None
        self.begun = False  # the ranks of this process have begun
        self.heard = time.monotonic()  # when the caller of the run last gave a sign

    # ------------------------------------------------------------ open and close

    def listen(self) -> Address:
        """Accept connections from now on."""
        tcp = socket.create_server((self.host, 0), family=_family(self.host), backlog=128)
        self._listeners.append(tcp)
        unix = "" if self.only_tcp else self._listen_unix()
        for listener in self._listeners:
            accept = threading.Thread(target=self._accept, args=(listener,), **_DAEMON)
            self._threads.append(accept)
            accept.start()
        self.address = Address(
            self.process, host_identity(), unix, tcp.getsockname()[:2], time.monotonic()
        )
        return self.address

    def _listen_unix(self) -> str:
        if not hasattr(socket, "AF_UNIX") or not hasattr(socket, "send_fds"):
            return ""
        if os.path.exists("/proc/self/ns/net"):
            name = f"\0many-hands-{uuid.uuid4().hex}"  # Linux: a name outside the file system
        else:
            self._unix_folder = tempfile.TemporaryDirectory(prefix="mh-")
            name = os.path.join(self._unix_folder.name, "s")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(name)
        listener.listen(128)
        self._listeners.append(listener)
        return name

    def close(self) -> None:
        """End all connections and threads. May be called twice."""
        with self._lock:
            listeners, self._listeners = self._listeners, []
            incoming, self._incoming = self._incoming, {}
            threads, self._threads = self._threads, []
            guests, numbers = list(self._guests), list(self._segments)
        for listener in listeners:
            _wake_and_close(listener)
        for guest in guests:
            _cut(guest)  # and its thread closes it
        for receiver in incoming.values():
            receiver.close(farewell=False)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(handshake.SECONDS + 1)
        self._local.clear()
        self._windows.clear()
        for number in numbers:
            self._forget(number)
        if self._unix_folder:
            self._unix_folder.cleanup()

    def end(self, cause: str) -> None:
        """Tell all ranks here to stop."""
        if self.ended is None:
            self.ended = cause
        for port in list(self.ports.values()):
            port.ring()

    def all_began(self) -> None:
        """From now on a rank that gives no sign is missed."""
        self.started = min(self.started, time.monotonic())
        for port in list(self.ports.values()):
            port.ring()

    def missed_since(self) -> float:
        """From then on a rank that gives no sign is missed (`time.monotonic`)."""
        return min(self.started, self.heard + CALLER_SECONDS)

    def check(self) -> None:
        """Raise `RunEnded` when the run has been ended."""
        if self.ended is not None:
            raise RunEnded(self.ended)

    def unread(self) -> list[tuple[int, int, str]]:
        """Messages that nobody has received: source, target, and what they are."""
        with self._lock:
            channels = {**self._local, **self._incoming}
        found = [(*key[:2], channel.unread()) for key, channel in channels.items()]
        return [item for item in found if item[2]]

    def drop(self, rank: int) -> None:
        """Cut the connections to a rank that has failed, so that its peers notice at once."""
        with self._lock:
            mine = [key for key in self._incoming if key[1] == rank]
            receivers = [self._incoming.pop(key) for key in mine]
        for receiver in receivers:
            receiver.close(farewell=False)

    def finish(self, ranks) -> None:
        """These ranks have ended their programs: who waits for them waits in vain."""
        self.finished.update(ranks)
        for port in list(self.ports.values()):
            port.ring()

    # ------------------------------------------------------------ channels

    def outgoing(self, source: int, target: int, lane: int):
        """The channel on which `source`, a rank of this process, sends to `target`."""
        there = self.table[target]
        if there.process == self.address.process:
            return self._local_channel(source, target, lane)
        request = Request(CHANNEL, source, target, lane)
        if self._is_near(there):
            return Sender(self._dial_unix(there, request), self._open_window)
        return Sender(self._dial_tcp(there, request))

    def incoming(self, source: int, target: int, lane: int):
        """The channel from `source`; None as long as it has not connected."""
        if self.table[source].process == self.address.process:
            return self._local_channel(source, target, lane)
        return self._incoming.get((source, target, lane))

    def _is_near(self, there: Address) -> bool:
        return bool(there.unix and self.address.unix and there.host == self.address.host)

    def near(self, rank: int) -> bool:
        """True when this process can look at the memory of that rank."""
        there = self.table[rank]
        return there.process == self.address.process or self._is_near(there)

    def here(self, rank: int) -> bool:
        """True when that rank is a thread of this process."""
        return self.table[rank].process == self.address.process

    def _local_channel(self, source, target, lane):
        with self._lock:
            key = (source, target, lane)
            if key not in self._local:
                self._local[key] = LocalChannel(
                    ring=lambda: self._ring(target, lane), finished=lambda: source in self.finished
                )
            return self._local[key]

    def _ring(self, rank, lane):
        port = self.ports.get((rank, lane))
        if port is not None:
            port.ring()

    def _dial_unix(self, there: Address, request: Request) -> socket.socket:
        return self._dial(there, socket.AF_UNIX, there.unix, request)

    def _dial_tcp(self, there: Address, request: Request) -> socket.socket:
        return self._dial(there, _family(there.tcp[0]), there.tcp, request)

    def _dial(self, there, family, place, request):
        """A connection of which both ends have proved to belong to this run."""
        end = time.monotonic() + self.patience
        while True:
            try:
                return self._dial_once(there.process, family, place, request, end)
            except ConnectionRefusedError as error:  # nobody listens there: the process has gone
                cause = error
            except (ConnectionError, ssl.SSLEOFError) as error:
                # This process was so slow that the other end took it for a stranger, or strangers
                # pushed it out: once more. Where the other end has gone, that is refused.
                cause = error if time.monotonic() > end else None
            except OSError as error:
                cause = error
            if cause is not None:
                raise PeerLost(f"rank {request.target} does not answer ({cause})")
            time.sleep(AGAIN_SECONDS)
            self.check()

    def _dial_once(self, name, family, place, request, end):
        sock = socket.socket(family)
        try:
            sock.setblocking(False)
            self._connect(sock, place, end)
            if family != getattr(socket, "AF_UNIX", None):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.security.dialler:
                    sock = self.security.dialler.wrap_socket(sock, do_handshake_on_connect=False)
                    handshake.wait_for(sock.do_handshake, sock, end, self.check)
            handshake.dial(sock, self.security.secret, name, request, end, self.check)
        except BaseException:
            sock.close()
            raise
        return sock

    def _connect(self, sock, place, end):
        """Connect a socket that does not block; give up when the run ends."""
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while code := sock.connect_ex(place):
            if code == errno.EISCONN:
                return
            if code not in _NOT_YET:
                raise OSError(code, os.strerror(code))
            if time.monotonic() > end:
                raise TimeoutError("it took no connection in time")
            if code == errno.EAGAIN and sock.family == getattr(socket, "AF_UNIX", None):
                time.sleep(AGAIN_SECONDS)  # the queue of a Unix socket is full: nobody tells when
            else:
                poll.poll(handshake.LOOK_SECONDS * 1000)
            self.check()

    # ------------------------------------------------------------ shared memory

    def share(self, nbytes: int) -> np.ndarray | None:
        """Memory that peers on this host can look at, uint8; None where there is no room."""
        try:
            fd, memory = create(nbytes)
        except OSError:
            return None
        first = memory.__array_interface__["data"][0]
        with self._lock:
            self._numbers += 1
            number = self._numbers
            self._places.clear()
            self._segments[number] = fd, first, nbytes
        weakref.finalize(memory, self._forget, number).atexit = False
        return memory

    def whereabouts(self, array: np.ndarray) -> tuple[int, int] | None:
        """The segment in which a contiguous array lies, and its first byte there; else None."""
        start, size = array.__array_interface__["data"][0], array.nbytes
        found = self._places.get((start, size), self)
        if found is not self:
            return found
        with self._lock:
            found = None
            for number, (_, first, nbytes) in list(self._segments.items()):
                if first <= start and start + size <= first + nbytes:
                    found = number, start - first
            if len(self._places) >= MOST_PLACES:
                self._places.clear()
            self._places[start, size] = found
        return found

    def _forget(self, number):
        """Give a segment's descriptor back: its array is gone, or the run is over."""
        with self._lock:
            fd, _, _ = self._segments.pop(number, (-1, 0, 0))
            self._places.clear()
        if fd >= 0:
            os.close(fd)

    def attach(self, rank: int, number: int) -> np.ndarray:
        """The memory of another process's segment, uint8."""
        request = Request(SEGMENT, target=rank, segment=number)
        with self._dial_unix(self.table[rank], request) as sock:
            flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
            end = time.monotonic() + self.patience
            message, parts, _, _ = handshake.wait_for(
                lambda: sock.recvmsg(8, socket.CMSG_LEN(4), flags), sock, end, self.check
            )
            fds = [int.from_bytes(data[:4], sys.byteorder) for *_, data in parts]
            if not fds:
                raise CommunicationError(f"rank {rank} no longer has a piece of shared memory")
            try:
                return attach(fds[0], int.from_bytes(message, "little"))
            finally:
                os.close(fds[0])

    def _open_window(self, nbytes):
        memory = self.share(nbytes)
        if memory is None:
            return None
        # Until the end of the run: a receiver may look at it when the sender has ended.
        self._windows.append(memory)
        return self.whereabouts(memory)[0], memory

    # ------------------------------------------------------------ the listening side

    def _accept(self, listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                if not self._listeners:
                    return  # closed
                # No descriptor is free, or a guest left at once: that is no reason to go deaf.
                self._push_out()
                time.sleep(AGAIN_SECONDS)
                continue
            try:
                sock = self._prepared(sock)
            except OSError:
                sock.close()
                continue
            if not self._admit(sock):
                sock.close()
                return

    def _prepared(self, sock):
        sock.setblocking(False)
        if sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.security.listener:
                context = self.security.listener
                return context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return sock

    def _admit(self, sock) -> bool:
        """Let a thread look at a guest; False when this endpoint is closed."""
        thread = threading.Thread(target=self._welcome, args=(sock,), **_DAEMON)
        with self._lock:
            if not self._listeners:
                return False
            if len(self._guests) >= MOST_GUESTS:
                self._push_out()
            self._guests[sock] = None
            self._threads = [t for t in self._threads if t.is_alive()]
            try:
                thread.start()
            except RuntimeError:  # the system gives no more threads
                del self._guests[sock]
                sock.close()
                return True
            self._threads.append(thread)
        return True

    def _push_out(self):
        """Drop the guest that has been silent for longest."""
        with self._lock:
            for guest in list(self._guests)[:1]:
                del self._guests[guest]
                _cut(guest)

    def _welcome(self, sock):
        """Let in who knows the secret; drop everybody else."""
        try:
            if hasattr(sock, "do_handshake"):
                end = time.monotonic() + handshake.SECONDS
                handshake.wait_for(sock.do_handshake, sock, end)
            request = handshake.answer(sock, self.security.secret, self.process)
            if request.kind == SEGMENT:
                self._hand_over(sock, request.segment)
            else:
                self._take_in(sock, request)
        except OSError:
            sock.close()
        finally:
            self._guests.pop(sock, None)

    def _take_in(self, sock, request):
        receiver = Receiver(sock, lambda number: self.attach(request.source, number))
        with self._lock:
            if self._listeners:
                self._incoming[request.source, request.target, request.lane] = receiver
                sock = None
        if sock:
            sock.close()  # the run ended in this moment
        self._ring(request.target, request.lane)

    def is_coming(self) -> bool:
        """True while somebody is at the door: it may be a rank whose message is still to come."""
        return bool(self._guests)

    def _hand_over(self, sock, number):
        try:
            with self._lock:  # so that the descriptor is not closed and used anew meanwhile
                fd, _, nbytes = self._segments.get(number, (-1, 0, 0))
                if fd >= 0:
                    socket.send_fds(sock, [nbytes.to_bytes(8, "little")], [fd])
        finally:
            sock.close()


_DAEMON = {"daemon": True, "name": "many-hands-listener"}


def host_identity() -> str:
    """Equal for processes that can share memory through a Unix socket, different for others."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}-{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return f"{uuid.getnode()}-{socket.gethostname()}"


def _family(host):
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _cut(sock):
    """End a connection that another thread waits for, which then notices it. This is the socket's
    own method: that of a TLS socket would take the encryption away under the other thread."""
    with suppress(OSError):  # it has gone by itself
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _wake_and_close(listener):
    """A thread that sleeps in accept() does not notice a close: shutdown wakes it on Linux, a
    connection everywhere else."""
    try:
        listener.shutdown(socket.SHUT_RDWR)
    except OSError:
        try:
            with socket.socket(listener.family) as knock:
                knock.settimeout(1)
                knock.connect(listener.getsockname())
        except OSError:
            pass
    listener.close()
