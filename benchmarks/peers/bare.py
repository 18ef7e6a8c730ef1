"""The limits of an all-reduce of two ranks: bare memory passes, or bare bytes through a socket."""

import select
import socket
import sys
import time

import numpy as np

from benchmarks.peers.timing import SIZES, median_call, report

PATIENCE = 30


def connected(index, address, meet):
    """A TCP connection between the two ranks; its port is written to the file `meet`."""
    if index == 0:
        with socket.create_server((address, 0)) as server:
            with open(meet, "w") as file:
                file.write(f"{server.getsockname()[1]}\n")
            server.settimeout(PATIENCE)
            return server.accept()[0]
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with open(meet) as file:
                line = file.read()
        except FileNotFoundError:
            line = ""
        if line.endswith("\n"):
            return socket.create_connection((address, int(line)), timeout=PATIENCE)
        time.sleep(0.01)
    raise TimeoutError("The other rank did not appear.")


def exchange(link, mine, theirs):
    """Send and receive one array at once, from one thread."""
    to_send, to_fill = memoryview(mine).cast("B"), memoryview(theirs).cast("B")
    while to_send or to_fill:
        readable, writable, _ = select.select(
            [link] if to_fill else [], [link] if to_send else [], []
        )
        if readable:
            to_fill = to_fill[link.recv_into(to_fill) :]
        if writable:
            to_send = to_send[link.send(to_send) :]


def main(kind, size, index, _, address, meet):
    """Measure one size as rank `index` of two."""
    length, calls, blocks = SIZES[size]
    mine, theirs = np.ones(length, np.float32), np.ones(length, np.float32)
    with connected(int(index), address, meet) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.setblocking(False)

        def barrier():
            exchange(link, bytes(1), bytearray(1))

        def memory():
            np.negative(mine, out=mine)

        def tcp():
            exchange(link, mine, theirs)

        seconds = median_call({"memory": memory, "tcp": tcp}[kind], barrier, calls, blocks)
        barrier()
    report(seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
