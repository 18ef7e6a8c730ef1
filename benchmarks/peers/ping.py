"""A message goes to the other process and comes back, by one of several kinds of connection."""

import socket
import sys
import time
from multiprocessing.connection import Client, Listener

import numpy as np

from benchmarks.peers.bare import connected
from benchmarks.peers.timing import PINGS, median_call, report

PATIENCE = 30


def wait_for(attempt):
    """Try again and again until the other process is there."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return attempt()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def plain_tcp(index, address, meet):
    """Sending and receiving of a plain TCP socket."""
    link = connected(index, address, meet)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return of_socket(link)


def plain_unix(index, address, meet):
    """Sending and receiving of a plain Unix socket."""
    if index == 0:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(meet)
            listener.listen(1)
            return of_socket(listener.accept()[0])

    def attempt():
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(meet)
        except OSError:
            link.close()
            raise
        return link

    return of_socket(wait_for(attempt))


def of_socket(link):
    """What `ping` needs, over a connected socket."""

    def receive(into):
        view = memoryview(into).cast("B")
        while view.nbytes:
            view = view[link.recv_into(view) :]

    return link.sendall, receive, link.close


def of_multiprocessing(index, address, meet):
    """The same over multiprocessing.connection, authenticated, on a Unix socket."""
    if index == 0:
        with Listener(meet, "AF_UNIX", authkey=b"secret") as listener:
            link = listener.accept()
    else:
        link = wait_for(lambda: Client(meet, "AF_UNIX", authkey=b"secret"))
    return link.send_bytes, link.recv_bytes_into, link.close


def of_zmq(index, address, meet):
    """The same over a pair of sockets of ZeroMQ, between processes of one host."""
    import zmq

    context = zmq.Context()
    link = context.socket(zmq.PAIR)
    if index == 0:
        link.bind(f"ipc://{meet}")
    else:
        link.connect(f"ipc://{meet}")

    def send(data):
        link.send(data, copy=False)

    def receive(into):
        frame = link.recv(copy=False)
        np.copyto(into, np.frombuffer(frame.buffer, np.uint8))

    return send, receive, lambda: context.destroy(linger=1000)


KINDS = {
    "unix": plain_unix,
    "tcp": plain_tcp,
    "multiprocessing": of_multiprocessing,
    "zmq": of_zmq,
}


def main(kind, size, index, _, address, meet):
    """Measure one size as process `index` of two: half the time there and back."""
    index = int(index)
    length, calls, blocks = PINGS[size]
    mine, theirs = np.ones(length, np.uint8), np.zeros(length, np.uint8)
    send, receive, close = KINDS[kind](index, address, meet)

    def ping():
        if index == 0:
            send(mine)
            receive(theirs)
        else:
            receive(theirs)
            send(mine)

    try:
        seconds = median_call(ping, ping, calls, blocks)
        if not theirs.all():
            raise RuntimeError("The message did not arrive whole.")
        if index == 0:
            report(seconds / 2)
    finally:
        close()


if __name__ == "__main__":
    main(*sys.argv[1:])
