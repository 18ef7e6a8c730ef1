"""Two ends of a connection prove to each other that they know the secret of this run.

    listener -> dialler   nonce L (32 random bytes)
    dialler -> listener   nonce D, request, HMAC(secret, "dial" + L + D + request + name)
    listener -> dialler   HMAC(secret, "listen" + D + L)

The name is the listener's, as the dialler knows it from Dask: nobody in between can lead the call
to another end, or back to the dialler itself. All three messages have a fixed length. The listener
looks at the request only after its HMAC was found right, so that nothing a stranger sends is ever
interpreted. The secret is drawn for one run and reaches the ranks through Dask; it never crosses
these connections itself. The scheme is that of ``multiprocessing.connection``, in both directions
at once and with the request protected too. It says who is there; what follows is hidden, and
protected from changes on the way, only by TLS.
"""

from __future__ import annotations

import hmac
import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

NONCE = 32
SECONDS = 3.0
"""An honest dialler answers within milliseconds; a silent one is dropped after this time."""
LOOK_SECONDS = 0.1
"""How often somebody who waits looks whether the run has ended."""

_FIELDS = struct.Struct("<BiiiQ")


class Refused(OSError):
    """The other end does not know the secret, or did not prove it in time."""


class Closed(ConnectionError):
    """The other end closed the connection before both had proved to know the secret."""


class Request(NamedTuple):
    """What a connection is for: messages from one rank to another, or a segment's descriptor."""

    kind: int
    source: int = 0
    target: int = 0
    lane: int = 0
    segment: int = 0


CHANNEL, SEGMENT = 1, 2


def dial(
    sock: socket.socket,
    secret: bytes,
    name: str,
    request: Request,
    end: float | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """The dialler's side.

    Parameters
    ----------
    sock : socket.socket
        Connected, and not blocking.
    secret : bytes
    name : str
        Of the process that is called (`Address.process`).
    request : Request
    end : float, optional
        Until when the other end is waited for (`time.monotonic`). Default: `SECONDS` from now.
    check : callable
        Called now and then; it may raise, to end the waiting.

    Raises
    ------
    Refused
        The other end does not know the secret, or did not answer in time.
    OSError
        The connection broke.
    """
    end = time.monotonic() + SECONDS if end is None else end
    theirs, mine = _read(sock, NONCE, end, check), os.urandom(NONCE)
    packed = _FIELDS.pack(*request)
    sock.sendall(mine + packed + _proof(secret, b"dial", theirs, mine, packed, name=name))
    answered = _read(sock, 32, end, check)
    if not hmac.compare_digest(answered, _proof(secret, b"listen", mine, theirs)):
        raise Refused("the other end does not know the secret of this run")


def answer(sock: socket.socket, secret: bytes, name: str) -> Request:
    """The listener's side: the request of a dialler that knows the secret and this process's name.

    The socket does not block. Raises `Refused`, or OSError when the connection breaks.
    """
    end = time.monotonic() + SECONDS
    mine = os.urandom(NONCE)
    sock.sendall(mine)
    message = _read(sock, NONCE + _FIELDS.size + 32, end)
    theirs, packed = message[:NONCE], message[NONCE:-32]
    if not hmac.compare_digest(
        message[-32:], _proof(secret, b"dial", mine, theirs, packed, name=name)
    ):
        raise Refused("a stranger connected")
    sock.sendall(_proof(secret, b"listen", theirs, mine))
    return Request(*_FIELDS.unpack(packed))


def _proof(secret: bytes, kind: bytes, *parts: bytes, name: str = "") -> bytes:
    # All parts but the name, which comes last, have fixed lengths: no two lists look alike.
    return hmac.digest(secret, b"".join([kind, *parts, name.encode()]), "sha256")


def wait_for(act: Callable, sock: socket.socket, end: float, check=lambda: None):
    """Call a step that does not block until it succeeds, the time is over, or `check` raises."""
    while True:
        try:
            return act()
        except (BlockingIOError, ssl.SSLWantReadError):
            event = select.POLLIN
        except ssl.SSLWantWriteError:
            event = select.POLLOUT
        left = end - time.monotonic()
        if left <= 0:
            raise Refused("the other end did not answer in time")
        poll = select.poll()
        poll.register(sock, event)
        poll.poll(min(left, LOOK_SECONDS) * 1000)
        check()


def _read(sock, nbytes, end, check=lambda: None) -> bytes:
    """Exactly so many bytes, however slowly they come, until the time is over."""
    read = b""
    while len(read) < nbytes:
        left = nbytes - len(read)
        more = wait_for(lambda left=left: sock.recv(left), sock, end, check)
        if not more:
            raise Closed("the other end closed the connection")
        read += more
    return read
