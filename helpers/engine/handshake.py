"""Two ends of a connection prove to each other that they know the secret of this run.

    listener -> dialler   nonce L (32 random bytes)
    dialler -> listener   nonce D, request, HMAC(secret, "dial" + L + D + request)
    listener -> dialler   HMAC(secret, "listen" + D + L)

All three messages have a fixed length. The listener looks at the request only after its HMAC was
found right, so that nothing a stranger sends is ever interpreted. The secret is drawn for one run
and reaches the ranks through Dask; it never crosses these connections itself. The scheme is that of
``multiprocessing.connection``, in both directions at once and with the request protected too.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
import time
from typing import NamedTuple

NONCE = 32
SECONDS = 3.0
"""An honest end answers within milliseconds; a silent one is dropped after this time."""

_FIELDS = struct.Struct("<BiiiQ")


class Refused(ConnectionError):
    """The other end does not know the secret, or did not prove it in time."""


class Request(NamedTuple):
    """What a connection is for: messages from one rank to another, or a segment's descriptor."""

    kind: int
    source: int = 0
    target: int = 0
    lane: int = 0
    segment: int = 0


CHANNEL, SEGMENT = 1, 2


def dial(sock: socket.socket, secret: bytes, request: Request) -> None:
    """The dialler's side. Raises `Refused`, or OSError when the connection breaks."""
    end = time.monotonic() + SECONDS
    theirs, mine, packed = _read(sock, NONCE, end), os.urandom(NONCE), _FIELDS.pack(*request)
    proof = _proof(secret, b"dial", theirs, mine, packed)
    sock.sendall(mine + packed + proof)
    if not hmac.compare_digest(_read(sock, 32, end), _proof(secret, b"listen", mine, theirs)):
        raise Refused("the other end does not know the secret of this run")


def answer(sock: socket.socket, secret: bytes) -> Request:
    """The listener's side: the request of a dialler that knows the secret."""
    end = time.monotonic() + SECONDS
    mine = os.urandom(NONCE)
    sock.sendall(mine)
    message = _read(sock, NONCE + _FIELDS.size + 32, end)
    theirs, packed = message[:NONCE], message[NONCE:-32]
    if not hmac.compare_digest(message[-32:], _proof(secret, b"dial", mine, theirs, packed)):
        raise Refused("a stranger connected")
    sock.sendall(_proof(secret, b"listen", theirs, mine))
    return Request(*_FIELDS.unpack(packed))


def _proof(secret: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"".join(parts), "sha256")


def _read(sock: socket.socket, nbytes: int, end: float) -> bytes:
    """Exactly so many bytes, however slowly they come, until the time is over."""
    read = b""
    while len(read) < nbytes:
        sock.settimeout(max(0.001, end - time.monotonic()))
        try:
            more = sock.recv(nbytes - len(read))
        except TimeoutError:
            raise Refused("the other end did not answer in time") from None
        if not more:
            raise Refused("the other end closed the connection")
        read += more
    return read
