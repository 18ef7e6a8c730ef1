"""How the ranks in one process reach those in others, and how others reach them.

Each process that holds ranks of a run has one `Endpoint`. It listens on a Unix socket for peers on
the same host, and on TCP for those on other hosts (with TLS where the Dask cluster uses TLS). A
channel is dialled by the rank that sends first, in that direction only. Plain sockets were chosen
after measurement: `benchmarks/README.md` has the figures of multiprocessing.connection, pyzmq and
plain sockets side by side.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
import uuid
import weakref
from dataclasses import dataclass, field

import numpy as np

from helpers.engine import handshake
from helpers.engine.channels import LocalChannel, Receiver, Sender
from helpers.engine.errors import CommunicationError, PeerLost
from helpers.engine.handshake import CHANNEL, SEGMENT, Request
from helpers.engine.memory import attach, create

CONNECT_SECONDS = 3.0
UNCLAIMED_SECONDS = 30.0
"""An endpoint that nobody uses any more closes itself after this time: its caller has died."""


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
    """

    security: Security
    host: str = "127.0.0.1"
    only_tcp: bool = False
    ended: str | None = None
    ports: dict = field(default_factory=dict)  # (rank, lane) -> Port
    table: list = field(default_factory=list)  # rank -> Address
    finished: set = field(default_factory=set)  # ranks whose program has ended

    def __post_init__(self):
        self._lock = threading.RLock()  # a finalizer may run in a thread that holds it
        self._local = {}  # (source, target, lane) -> LocalChannel
        self._incoming = {}  # (source, target, lane) -> Receiver
        self._segments = {}  # number -> (descriptor, first address, bytes)
        self._numbers = 0
        self._listeners, self._threads, self._unix_folder = [], [], None
        self._guests = set()  # sockets that have not yet proved to know the secret
        self.address = None

    # ------------------------------------------------------------ open and close

    def listen(self) -> Address:
        """Accept connections from now on."""
        tcp = socket.create_server((self.host, 0), family=_family(self.host), backlog=128)
        self._listeners.append(tcp)
        unix = "" if self.only_tcp else self._listen_unix()
        for listener in self._listeners:
            self._start(self._accept, listener)
        self.address = Address(
            uuid.uuid4().hex, host_identity(), unix, tcp.getsockname()[:2], time.monotonic()
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
            _wake_and_close(guest)
        for receiver in incoming.values():
            receiver.close(farewell=False)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(handshake.SECONDS + 1)
        self._local.clear()
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
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(CONNECT_SECONDS)
            sock.connect(there.unix)
            handshake.dial(sock, self.security.secret, request)
        except OSError as error:
            sock.close()
            raise PeerLost(f"rank {request.target} does not answer ({error})") from None
        return sock

    def _dial_tcp(self, there: Address, request: Request) -> socket.socket:
        sock = None
        try:
            sock = socket.create_connection(there.tcp, timeout=CONNECT_SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.security.dialler:
                sock = self.security.dialler.wrap_socket(sock)
            handshake.dial(sock, self.security.secret, request)
        except OSError as error:
            if sock:
                sock.close()
            raise PeerLost(f"rank {request.target} does not answer ({error})") from None
        return sock

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
            self._segments[number] = fd, first, nbytes
        weakref.finalize(memory, self._forget, number).atexit = False
        return memory

    def whereabouts(self, array: np.ndarray) -> tuple[int, int] | None:
        """The segment in which a contiguous array lies, and its first byte there; else None."""
        start = array.__array_interface__["data"][0]
        for number, (_, first, nbytes) in list(self._segments.items()):
            if first <= start and start + array.nbytes <= first + nbytes:
                return number, start - first
        return None

    def _forget(self, number):
        """Give a segment's descriptor back: its array is gone, or the run is over."""
        with self._lock:
            fd, _, _ = self._segments.pop(number, (-1, 0, 0))
        if fd >= 0:
            os.close(fd)

    def attach(self, rank: int, number: int) -> np.ndarray:
        """The memory of another process's segment, uint8."""
        request = Request(SEGMENT, target=rank, segment=number)
        with self._dial_unix(self.table[rank], request) as sock:
            message, fds, _, _ = socket.recv_fds(sock, 8, 1)
            if not fds:
                raise CommunicationError(f"rank {rank} no longer has a piece of shared memory")
            try:
                return attach(fds[0], int.from_bytes(message, "little"))
            finally:
                os.close(fds[0])

    def _open_window(self, nbytes):
        memory = self.share(nbytes)
        return None if memory is None else (self.whereabouts(memory)[0], memory)

    # ------------------------------------------------------------ the listening side

    def _start(self, act, *args):
        thread = threading.Thread(target=act, args=args, daemon=True, name="many-hands-listener")
        with self._lock:
            self._threads = [t for t in self._threads if t.is_alive() or not t.ident]
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # closed
            if not self._listeners:
                sock.close()
                return
            self._start(self._welcome, sock)

    def _welcome(self, sock):
        """Let in who knows the secret; drop everybody else."""
        self._guests.add(sock)
        try:
            request, sock = self._ask(sock)
        except OSError:
            sock.close()
            return
        finally:
            self._guests.discard(sock)
        if request.kind == SEGMENT:
            self._hand_over(sock, request.segment)
        else:
            self._connect(sock, request)

    def _ask(self, sock):
        sock.settimeout(handshake.SECONDS)
        if sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.security.listener:
                sock = self.security.listener.wrap_socket(sock, server_side=True)
        return handshake.answer(sock, self.security.secret), sock

    def _connect(self, sock, request):
        receiver = Receiver(sock, lambda number: self.attach(request.source, number))
        with self._lock:
            if self._listeners:
                self._incoming[request.source, request.target, request.lane] = receiver
                sock = None
        if sock:
            sock.close()  # the run ended in this moment
        self._ring(request.target, request.lane)

    def _hand_over(self, sock, number):
        fd, _, nbytes = self._segments.get(number, (-1, 0, 0))
        try:
            if fd >= 0:
                socket.send_fds(sock, [nbytes.to_bytes(8, "little")], [fd])
        except OSError:
            pass  # who asked has gone
        finally:
            sock.close()


def host_identity() -> str:
    """Equal for processes that can share memory through a Unix socket, different for others."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}-{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return f"{uuid.getnode()}-{socket.gethostname()}"


def _family(host):
    return socket.AF_INET6 if ":" in host else socket.AF_INET


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
