"""One message from process to process: which kind of connection should carry the ranks' messages?

Seconds from one process to another on this host: half the time of a message there and back, the
median over blocks. Less is better. The ranks' signals are a byte, and where the ranks share no
memory the arrays themselves go through the connection.

ours
    A plain Unix socket, as `helpers.engine` uses between processes of one host.
tcp
    A plain TCP socket over loopback, as `helpers.engine` uses between hosts.
multiprocessing
    ``multiprocessing.connection`` over a Unix socket. It sends and receives whole messages only,
    and cannot wait for several things at once without a thread.
zmq
    A PAIR of pyzmq over ``ipc``. A thread of ZeroMQ stands between program and socket.
"""

from benchmarks.measure import Case, interleaved
from benchmarks.peers import launch
from benchmarks.peers.timing import PINGS

ROUNDS = 5


def run(rounds=ROUNDS):
    """Measure all cases.

    Parameters
    ----------
    rounds : int

    Returns
    -------
    list of Case
    """
    cases = []
    for size in PINGS:
        sides = {
            kind: lambda kind=kind, size=size: launch.ranks("benchmarks.peers.ping", kind, size)
            for kind in ("unix", "tcp", "multiprocessing", "zmq")
        }
        medians = interleaved(sides, rounds)
        cases.append(Case(size, medians.pop("unix"), medians, None))
    return cases
