"""Two ranks add up their arrays, in place: the exchange of every data-parallel step.

Seconds of one call, as rank 0 sees them: the median over blocks of calls, each after a barrier.
Less is better. 328 KB are the gradient of a small network; 32 MB fit in no cache of a core.

ours
    Two Dask workers on this machine; the array comes from ``rank.empty``, which the other rank can
    read. ``ordinary_array`` is the same call with an ordinary NumPy array.
gloo
    PyTorch's all_reduce of CPU tensors, which is what its users get without a GPU.
mpi
    Open MPI's Allreduce with ``IN_PLACE`` by mpi4py, over shared memory.
limit
    Every byte of the inputs must be read and every byte of the results be written, by somebody.
    Shared evenly, each of two ranks reads one array and writes as much: two processes at once
    pass over an array of their own, in place. Waiting and what moves between the cores' caches
    is left out.

In the cases with TCP the ranks are in two network namespaces, joined by a virtual Ethernet cable;
without the right to make them, they use loopback. The limit there is one plain TCP connection
through which both ranks send their array at once, without adding.
"""

from contextlib import ExitStack

import numpy as np
from distributed import Client

from benchmarks.measure import Case, interleaved
from benchmarks.peers import launch
from benchmarks.peers.timing import SIZES, check_sum, median_call, report
from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.collectives import all_reduce, barrier
from helpers.engine.mesh import Mesh

ROUNDS = 5


def program(rank, size, ordinary):
    """What each rank of ours does.

    Parameters
    ----------
    rank : Rank
    size : str
        A key of `SIZES`.
    ordinary : bool
        Take an ordinary array instead of one that the peers can read.

    Returns
    -------
    float
        Median seconds of one call.
    """
    length, calls, blocks = SIZES[size]
    array = (np.empty if ordinary else rank.empty)(length, np.float32)
    array.fill(rank.index + 1)
    all_reduce(rank.world, array, out=array)
    check_sum(array)
    array.fill(0)
    return median_call(
        lambda: all_reduce(rank.world, array, out=array), lambda: barrier(rank.world), calls, blocks
    )


def ours(size, ordinary=False, scheduler_file=None):
    """Measure ours once, in this process, and report it; with a scheduler file, over TCP."""
    with ExitStack() as stack:
        if scheduler_file:
            client = stack.enter_context(Client(scheduler_file=scheduler_file))
            client.wait_for_workers(2, timeout=30)
        else:
            client = stack.enter_context(open_cluster(workers=2)).client
        transport = "tcp" if scheduler_file else None
        run = spmd.run(client, Mesh(data=2), program, size, ordinary, transport=transport)
        report(run.results[0])


def _ours(size, ordinary=False, places=None):
    call = f"from benchmarks.all_reduce import ours; ours({size!r}, {ordinary}"
    if places is None:
        return launch.python(f"{call})")
    with launch.dask_across(places) as file:
        return launch.python(f"{call}, {file!r})", places[0])


def _here(size, peers):
    sides = {
        "ours": lambda: _ours(size),
        "ordinary_array": lambda: _ours(size, ordinary=True),
        "limit": lambda: launch.ranks("benchmarks.peers.bare", "memory", size),
    }
    if "gloo" in peers:
        sides["gloo"] = lambda: launch.ranks("benchmarks.peers.gloo_all_reduce", size)
    if "mpi" in peers:
        sides["mpi"] = lambda: launch.mpi_ranks("benchmarks.peers.mpi_all_reduce", size)
    return sides


def _apart(size, peers, places):
    sides = {
        "ours": lambda: _ours(size, places=places),
        "limit": lambda: launch.ranks("benchmarks.peers.bare", "tcp", size, places=places),
    }
    if "gloo" in peers:
        module = "benchmarks.peers.gloo_all_reduce"
        sides["gloo"] = lambda: launch.ranks(module, size, places=places)
    return sides


def _case(name, medians):
    more = {key: medians.pop(key) for key in ("ordinary_array",) if key in medians}
    return Case(name, medians.pop("ours"), medians, medians.pop("limit"), more)


def run(rounds=ROUNDS):
    """Measure all cases.

    Parameters
    ----------
    rounds : int

    Returns
    -------
    list of Case
        With ``more["ordinary_array"]``, seconds, where the ranks share a host.
    """
    peers = launch.present(["gloo", "mpi"])
    cases = [_case(size, interleaved(_here(size, peers), rounds)) for size in SIZES]
    with launch.two_places() as (places, network):
        for size in SIZES:
            medians = interleaved(_apart(size, peers, places), rounds)
            cases.append(_case(f"{size}, {network}", medians))
    return cases
